"""A step by names alone, so that it can travel to another process and be repeated by hand."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lsa import probe
from lsa.probe import Result
from lsa.project import TRAJECTORY, Project, trusted_by
from lsa.studies import adoption, load, measure, progress, train, trajectory
from lsa.tracking import registry, store
from lsa.tracking.checkpoint import Checkpoint

TRAIN = "train"


@dataclass(frozen=True)
class Call:
    """One step: `train`, a probe, or a probe along the training (`trajectory.<probe>`)."""

    step: str
    setting: Project
    optimizers: tuple[str, ...]  # of the training, or of the probe's checkpoints
    seeds: tuple[int, ...]  # of the same
    options: Mapping[str, Any] = field(default_factory=dict)  # all of the probe's; what is given
    device: str = "auto"

    @property
    def label(self) -> str:
        """Name of the call in lists and messages."""
        given = [f"{k}={v}" for k, v in self.options.items()] if self.step == TRAIN else []
        seeds = " – ".join(map(str, dict.fromkeys(self.seeds)))
        return " ".join([self.step, " – ".join(self.optimizers), f"seed {seeds}", *given])

    def command(self, checkpoints: Sequence[str] = ()) -> str:
        """The command that repeats it.

        Args:
            checkpoints: Runs of the trainings that a probe measured, where the project's names do
                not lead to them: a training with options of its own.
        """
        name = self.step.removeprefix(TRAJECTORY)
        words = ["lsa", name]
        if not checkpoints:
            words += ["--project", self.setting.reference]
        options = self.options
        if self.step != TRAIN:
            declared = probe.find(name)
            usual = self.setting.options(declared, trajectory=name != self.step)
            if checkpoints:  # a checkpoint's own project is not asked for options
                usual = {option.name: option.default for option in declared.options.values()}
            options = {k: v for k, v in options.items() if usual.get(k) != v}
        for i, suffix in enumerate(("", "_b", "_c")[: len(self.optimizers)]):
            if checkpoints:
                words += [f"--checkpoint{suffix}", checkpoints[i]]
            else:
                words += [f"--optimizer{suffix}", self.optimizers[i]]
                words += [f"--seed{suffix}", str(self.seeds[i])]
        for key, value in options.items():
            words += [f"--{key}", str(value)]
        if name != self.step:
            words += ["--epochs", "all"]
        return shlex.join(words)


def perform(call: Call, *trained: Result) -> Result:
    """Run a call, or read its finished run; returns the result without arrays.

    Args:
        call: What to run.
        *trained: The trainings whose checkpoints a probe takes.
    """
    with progress.titled(call.label):  # without arrays as large as θ, which its run keeps
        return replace(_perform(call, [training.checkpoint for training in trained]), arrays={})


def _perform(call: Call, addresses: Sequence[str]) -> Result:
    overrides = call.options if call.step == TRAIN else {}
    recipe = call.setting.recipe(call.optimizers[0], call.seeds[0], **overrides)
    trusted = trusted_by(recipe)
    if reference := call.setting.registered(call.optimizers[0], call.seeds[0]):
        if call.step == TRAIN:
            return adoption.listed(reference, recipe)
    elif call.step == TRAIN:
        return train.train(recipe, device=call.device, reuse=True, trusted=trusted)
    device = load.device_of(call.device)
    samples = call.setting.landscape.samples
    uri = store.uri()
    sources = [_checkpoint(uri, address, device, trusted, samples) for address in addresses]
    if call.step.startswith(TRAJECTORY):
        (final,) = sources
        return trajectory.measure_trajectory(
            call.step.removeprefix(TRAJECTORY), final, reuse=True, **call.options
        )
    return measure.measure(call.step, *sources, reuse=True, **call.options)


@functools.lru_cache(maxsize=4)
def _checkpoint(
    store: str, address: str, device: str, trusted: tuple[str, ...], samples: Any
) -> Checkpoint:
    """Fetch a checkpoint, once for consecutive probes on it: a registered version never changes."""
    source = registry.fetch(address, device=device, trusted=trusted)
    return load.on_subset(source, samples)

"""Findings of a study: each optimizer against each other on every headline number, over the seeds.

They are rebuilt from the tracking store alone, so they can be had on any machine that reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lsa import probe, tracking
from lsa.comparison import Comparison, Scale, compare
from lsa.errors import InputError
from lsa.project import Project
from lsa.tracking import Done

# What tells two measurements of one kind apart although they may be compared.
IDENTITY = {"optimizer", "seed", "checkpoint"}
TRAINING = ("final/val_accuracy", "final/train_loss")


@dataclass(frozen=True)
class Finding:
    """One pair of optimizers on one number."""

    metric: str
    comparison: Comparison


def findings(setting: Project) -> list[Finding]:
    """All pairs of the project's optimizers on accuracy, train loss and every headline number.

    Of several measurements of one checkpoint the newest counts. The train loss is among them
    because curvature falls and rises with it: optimizers that stopped at different losses differ
    in sharpness for that reason alone.

    Raises:
        InputError: Nothing measured, or measurements that are not alike: other options or samples.
    """
    newest = _newest(setting, tracking.finished_steps(setting.name))
    if not newest:
        raise InputError(
            f"nothing of project {setting.name} is measured in {tracking.store()}; run lsa study "
            f"{setting.name}"
        )
    found = []
    for metric in _metrics({step for step, _, _ in newest}):
        step = "train" if metric in TRAINING else metric.partition("/")[0]
        runs = [(o, seed, done) for (s, o, seed), done in newest.items() if s == step]
        _check_alike(step, [done for _, _, done in runs])
        values: dict[str, dict[int, float]] = {}
        for optimizer, seed, done in runs:
            known = {**done.metrics, **tracking.not_finite(done.tags)}
            if metric in known:
                values.setdefault(optimizer, {})[seed] = known[metric]
        if len(values) > 1:
            found += [Finding(metric, c) for c in compare(values, scale=_scale(metric, values))]
    return found


def _newest(setting: Project, steps: Iterable[Done]) -> dict[tuple[str, str, int], Done]:
    """(step, optimizer, seed) → its newest run, of the project's optimizers and seeds."""
    found: dict[tuple[str, str, int], Done] = {}
    for done in steps:
        tags = done.tags
        if "optimizer" not in tags or "lsa.input.b" in tags:
            continue  # a study, or a pair
        if tags["optimizer"] in setting.optimizers and int(tags["seed"]) in setting.seeds:
            found.setdefault((tags["lsa.step"], tags["optimizer"], int(tags["seed"])), done)
    order = {name: i for i, name in enumerate(setting.optimizers)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][1]], item[0])))


def _metrics(steps: set[str]) -> list[str]:
    """Full names of the numbers that those steps have to compare."""
    headline = [
        f"{name}/{metric}"
        for name in probe.modules()
        if name in steps
        for metric in probe.find(name).headline
    ]
    return [*TRAINING, *headline] if "train" in steps else headline


def _check_alike(step: str, runs: list[Done]) -> None:
    """Refuse to compare what was measured in different ways."""
    if step == "train":  # optimizers differ there by intent
        return
    settings = [{k: v for k, v in run.params.items() if k not in IDENTITY} for run in runs]
    for setting in settings[1:]:
        differing = sorted(
            k for k in setting.keys() | settings[0].keys() if setting.get(k) != settings[0].get(k)
        )
        if differing:
            name = differing[0]
            raise InputError(
                f"{step} was measured with {name}={settings[0].get(name)} and with "
                f"{name}={setting.get(name)}; run lsa study to measure all alike"
            )


def _scale(metric: str, values: dict[str, dict[int, float]]) -> Scale:
    """Ratios for positive sizes, differences for shares and for what changes sign."""
    positive = all(v > 0 for by_seed in values.values() for v in by_seed.values())
    return "ratio" if positive and "accuracy" not in metric else "difference"

"""A probe along a training: one tracked step over all checkpoints that the training kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from lsa import project
from lsa.figures import draw
from lsa.figures.trajectory import SHARPNESS
from lsa.probe import Metric, Probe, Result, find
from lsa.runtime import arguments, modes, ranks
from lsa.runtime.errors import InputError, one_line
from lsa.studies import load, measure, partial, progress, series, steps
from lsa.tracking import recording, registered, registry, results, runs, settings, store
from lsa.tracking.checkpoint import Checkpoint
from lsa.tracking.numbers import flat

STEP = project.TRAJECTORY  # + name of the probe: the step's name
ARTIFACT = "trajectory.json"


@settings.restored()
@modes.usual()
def measure_trajectory(
    name: str, final: Checkpoint, *, rng_seed: int = 0, reuse: bool = False, **options: Any
) -> Result:
    """Run a probe on every checkpoint that a training kept, as one tracked step.

    Each number is logged at step = epoch. `trajectory.json` holds them all, with the loss of the
    training split and the validation accuracy, both in evaluation mode, and λ_max's stability
    threshold where the optimizer has one.

    Args:
        name: A probe of one checkpoint.
        final: The training's final checkpoint.
        rng_seed: Of the probe's randomness, the same at every checkpoint.
        reuse: Return a finished step with the same key instead of measuring again.
        **options: The probe's options; the rest take their defaults.

    Raises:
        InputError: An unknown probe or option, a pair probe, or a training that kept its final
            checkpoint alone.
    """
    declared = find(name)
    project.check_per_checkpoint(declared, "a trajectory")
    measure.check_sources(declared, [final])
    rng_seed = arguments.whole_number("rng_seed", rng_seed)
    resolved = project.resolve(declared, options, "options")
    kept = models(registered.key(final.model_id), final.epoch, final.model_id)
    if len(kept) < 2:
        recipe = final.recipe
        raise InputError(
            f"the training of {recipe.optimizer} (seed {recipe.seed}) kept its final checkpoint "
            "alone; set train.checkpoint_every in the project and train again"
        )
    ids = [model_id for _, model_id in kept]
    samples = final.recipe.landscape.samples
    key = steps.probe_key(declared, resolved, ids, samples, rng_seed, trajectory=True)
    if ranks.rank():  # rank 0 logs what this one helps to compute
        return steps.helped(key, lambda: _compute(declared, final, kept, rng_seed, resolved))
    return steps.once(
        key,
        lambda: _measure(declared, final, kept, rng_seed, key, resolved),
        reuse=reuse,
        read=_read,
    )


def _read(run_id: str) -> Result:
    """The result of a finished trajectory, from its run.

    Raises:
        Broken: Its artifact is not there, or damaged.
        InputError: The store does not answer.
    """
    try:
        result = series.result(runs.artifact(run_id, ARTIFACT), run_id)
    except InputError:
        raise
    except results.DAMAGE as error:
        raise runs.Broken(
            f"run {run_id} holds no trajectory ({one_line(error)}); delete that run and measure "
            "again"
        ) from None
    return dataclasses.replace(result, reused=True)


def _compute(
    declared: Probe,
    final: Checkpoint,
    kept: Sequence[tuple[int, str]],
    seed: int,
    resolved: dict[str, Any],
) -> Result:
    """This rank's share of a probe at each checkpoint; the last one's result."""
    measured = _measured(declared, final, kept, seed, lambda *_: None, resolved)
    return [result for _, result in measured][-1]


def models(key: str, epoch: int, final: str) -> list[tuple[int, str]]:
    """Epoch and model id of every checkpoint that a training kept, by epoch.

    Args:
        key: Of the training; "" where it has none.
        epoch: Of the final checkpoint.
        final: Model id of the final checkpoint.
    """
    on_the_way = registered.trajectory(key) if key else []
    return sorted({**dict(on_the_way), epoch: final}.items())


def _measure(
    declared: Probe,
    final: Checkpoint,
    kept: Sequence[tuple[int, str]],
    seed: int,
    key: str,
    resolved: dict[str, Any],
) -> Result:
    step, recipe = STEP + declared.name, final.recipe
    title = steps.title(f"{declared.name} along", recipe)
    tags = steps.step_tags(step, recipe) | {"lsa.key": key, "lsa.input.a": final.model_id}
    tags |= {"lsa.ranks": ranks.size(), runs.SAMPLES: recipe.landscape.samples}
    with recording.run(title, experiment=recipe.project, tags=tags, device=final.device) as opened:
        opened.params(measure.probe_params([final], resolved, seed))
        opened.inputs([dataclasses.replace(final, model_id=model_id) for _, model_id in kept])
        measured: list[Result] = []
        with progress.bar(title) as report, contextlib.ExitStack() as until_all_are_measured:

            def memory(epoch: int) -> MutableMapping[str, list[float]]:
                step = store.step_name(f"{key}-{epoch}")
                return until_all_are_measured.enter_context(partial.numbers(step))

            for epoch, result in _measured(declared, final, kept, seed, report, resolved, memory):
                _log(opened, step, epoch, result, last=epoch == kept[-1][0])
                opened.attempt()
                measured.append(dataclasses.replace(result, arrays={}))  # θ-sized, and not kept
        content = series.content(declared, recipe, kept, measured)
        opened.json(content, ARTIFACT)
        about = f"{declared.summary} At every checkpoint that the training kept."
        converged = all(result.converged for result in measured)
        results.describe(opened, about, content["notes"], converged=converged)
        drawn = series.drawn(declared, content)
        for path, png in draw.pictures("trajectory", drawn, title).items():
            opened.picture(png, path)
    return series.result(content, opened.id)


def _measured(
    declared: Probe,
    final: Checkpoint,
    kept: Sequence[tuple[int, str]],
    seed: int,
    report: Any,
    resolved: dict[str, Any],
    memory: Callable[[int], MutableMapping[str, list[float]]] = lambda _: {},
) -> Iterator[tuple[int, Result]]:
    """Epoch and result at each checkpoint.

    `memory` of an epoch is what an interrupted run had computed there.
    """
    limit, _ = series.threshold(final.recipe, SHARPNESS)
    for i, (epoch, model_id) in enumerate(kept):
        source = _source(final, model_id)
        part = _part(report, i, len(kept), epoch)
        result = _at(declared, source, epoch, seed, part, resolved, memory(epoch))
        yield epoch, _against(result, limit)


def _source(final: Checkpoint, model_id: str) -> Checkpoint:
    """A checkpoint on the way, on the device and samples of the final one."""
    if model_id == final.model_id:
        return final
    address = f"models:/{model_id}"
    source = registry.fetch(address, device=final.device, trusted=tuple(final.trusted))
    return load.on_subset(source, final.recipe.landscape.samples)


def _at(
    declared: Probe,
    source: Checkpoint,
    epoch: int,
    seed: int,
    report: Any,
    options: dict[str, Any],
    memory: MutableMapping[str, list[float]],
) -> Result:
    """The probe's result at one checkpoint; what it refuses is told with the epoch."""
    try:
        measure.check_sources(declared, [source])
        return measure.call_probe(declared, [source], seed, report, options, memory)
    except InputError as error:
        raise InputError(f"at epoch {epoch}: {error}") from None


def _against(result: Result, limit: Mapping[str, Any] | None) -> Result:
    """With `threshold_ratio`, λ_max over its stability threshold: a diagnostic, no criterion."""
    top = next((result.metrics[name] for name in SHARPNESS if name in result.metrics), None)
    if top is None or limit is None or not limit["value"] > 0:
        return result
    errors = {source: error / limit["value"] for source, error in top.errors.items()}
    ratio = Metric(top.value / limit["value"], "", errors)
    return dataclasses.replace(result, metrics={**result.metrics, "threshold_ratio": ratio})


def _part(report: Any, done: int, parts: int, epoch: int) -> Any:
    """Progress of one checkpoint as a part of all."""

    def told(i: int, total: int, text: str = "") -> None:
        report(done * total + i, parts * total, f"epoch {epoch}: {text}")

    return told


def _log(opened: recording.Run, step: str, epoch: int, result: Result, *, last: bool) -> None:
    """The numbers at one epoch. One that is not finite is a tag, which knows no epoch: the last's.

    Not on the checkpoints: there they would stand beside the probe's own, with other options.
    """
    values = {f"{step}/converged": float(result.converged), **flat(step, result.metrics)}
    if not last:
        values = {name: value for name, value in values.items() if np.isfinite(value)}
    opened.metrics(values, step=epoch)

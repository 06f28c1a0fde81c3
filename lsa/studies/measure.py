"""One tracked call of a probe: one MLflow run."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsa import project
from lsa.figures import draw, interactive
from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
from lsa.landscape.derivatives.precision import full_float32
from lsa.probe import Probe, Result, find
from lsa.runtime import arguments, modes, ranks
from lsa.runtime.errors import InputError
from lsa.studies import partial, progress, steps
from lsa.tracking import recording, registered, registry, results, runs, settings, store
from lsa.tracking.checkpoint import Checkpoint


@settings.restored()
@modes.usual()
def measure(
    name: str,
    *sources: Checkpoint,
    rng_seed: int = 0,
    reuse: bool = False,
    **options: Any,
) -> Result:
    """Run a probe on a checkpoint (a pair probe on two, some on up to three) as a tracked step.

    Args:
        name: The probe.
        *sources: From `lsa.load`.
        rng_seed: Seed of the probe's own randomness; the same for every checkpoint, so that all
            are measured with the same random vectors.
        reuse: Return a finished step with the same key instead of measuring again.
        **options: The probe's options; the rest take their defaults.

    Returns:
        What was measured, with the `run_id` of the MLflow run that holds it.

    Raises:
        InputError: Unknown probe or option, or checkpoints that do not fit.
    """
    declared = find(name)
    check_sources(declared, sources)
    rng_seed = arguments.whole_number("rng_seed", rng_seed)
    resolved = project.resolve(declared, options, "options")
    recipe = sources[0].recipe
    models = [source.model_id for source in sources]
    key = steps.probe_key(declared, resolved, models, recipe.landscape.samples, rng_seed)
    if ranks.rank():  # rank 0 logs what this one helps to compute
        return steps.helped(
            key, lambda: call_probe(declared, sources, rng_seed, lambda *_: None, resolved)
        )
    return steps.once(
        key, lambda: _measure(declared, sources, rng_seed, key, resolved), reuse=reuse
    )


def _measure(
    declared: Probe, sources: Sequence[Checkpoint], seed: int, key: str, resolved: dict[str, Any]
) -> Result:
    name, recipe = declared.name, sources[0].recipe
    title = steps.title(name, *(s.recipe for s in sources))
    tags = steps.step_tags(name, recipe) | {"lsa.key": key, "lsa.ranks": ranks.size()}
    tags |= {f"lsa.input.{i}": s.model_id for i, s in zip("abc", sources, strict=False)}
    tags |= {runs.SAMPLES: recipe.landscape.samples}
    device = sources[0].device
    with (
        recording.run(title, experiment=recipe.project, tags=tags, device=device) as opened,
        partial.numbers(store.step_name(key)) as memory,
    ):
        opened.params(probe_params(sources, resolved, seed))
        opened.inputs(sources)
        landscape = sources[0].landscape
        opened.tags(
            {
                "lsa.chunk": landscape.chunk,
                "lsa.graph_memory": landscape.graph_memory,
                "lsa.layout": landscape.layout,
                "lsa.threads": torch.get_num_threads(),
            }
        )
        opened.attempt()
        with progress.bar(title) as report:
            result = call_probe(declared, sources, seed, report, resolved, memory=memory)
        results.log(opened, declared, result, sources)
        for path, png in draw.pictures(name, result, title).items():
            opened.picture(png, path)
        for path, page in interactive.pages(name, result, title).items():
            opened.text(page, path)
    return dataclasses.replace(result, run_id=opened.id)


def check_sources(declared: Probe, sources: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that a probe cannot take.

    Raises:
        InputError: Too few or many, of different models or data, or not finite.
    """
    budget.from_environment()
    least, most = 1 + declared.pair, declared.most
    if not least <= len(sources) <= most:
        wanted = most if least == most else f"{least} to {most}"
        raise InputError(f"probe {declared.name} takes {wanted} checkpoint(s), not {len(sources)}")
    for source in sources:
        if not isinstance(source, Checkpoint):
            raise InputError(
                f"a {type(source).__name__} is no checkpoint; give what lsa.load returns, or call "
                f"the probe itself: lsa.probe.find({declared.name!r})(landscape, …)"
            )
    a = sources[0]
    for b in sources[1:]:
        if a.recipe.model != b.recipe.model or a.data_hash != b.data_hash:
            raise InputError(
                f"the checkpoints are of different models or data ({a.recipe.model.name} on "
                f"{a.recipe.dataset.name}, {b.recipe.model.name} on {b.recipe.dataset.name}); "
                "choose all of one architecture and dataset"
            )
    for source in sources:
        if not torch.isfinite(source.theta).all():
            raise InputError(
                f"checkpoint {source.model_id} holds weights that are not finite: its training "
                "diverged; train again with a lower learning rate"
            )


def call_probe(
    declared: Probe,
    sources: Sequence[Checkpoint],
    seed: int,
    report: Any,
    options: dict[str, Any],
    memory: MutableMapping[str, list[float]] | None = None,
) -> Result:
    """The probe's result, with what the reader must know about the subset noted.

    Args:
        declared: The probe.
        sources: Its checkpoint, or several.
        seed: Of its randomness.
        report: Told its progress.
        options: All of them.
        memory: What an interrupted run of the step has left.
    """
    source, needed = sources[0], "optimizer" not in declared.optional
    available = {
        "landscape": lambda: source.landscape,
        "training": lambda: source.training,
        "validation": lambda: source.validation,
        "theta": lambda: source.theta,
        "theta_b": lambda: sources[1].theta,
        "theta_init": lambda: source.theta_init,
        "optimizer": lambda: source.optimizer if needed or source.has_optimizer else None,
        "others": lambda: _others(sources),
        "trajectory": lambda: lambda: _kept(source),
        # Ranks must compute the same points together, and the first alone has seen these.
        "memory": lambda: {} if memory is None or ranks.meeting() else memory,
        "rng": lambda: torch.Generator().manual_seed(seed),
        "report": lambda: report,
    }
    given = {name: available[name]() for name in declared.inputs}
    with full_float32():
        result = declared(**given, **options)
    landscape: Landscape = source.landscape
    training_samples = source.training.n_samples
    if "landscape" in declared.inputs and landscape.n_samples < training_samples:
        note = f"measured on {landscape.n_samples} of {training_samples} training samples"
        if any(name.startswith("lambda") for name in result.metrics):
            note += "; a subset biases λ_max up and λ_min down"
        result = dataclasses.replace(result, notes=(*result.notes, note))
    return result


def _others(sources: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """θ of all but the first, named by their optimizers, and by their letters where those agree."""
    names = [source.recipe.optimizer for source in sources]
    return {
        name if names.count(name) == 1 else f"{name} ({letter})": source.theta
        for letter, name, source in zip("abc", names, sources, strict=False)
        if source is not sources[0]
    }


def _kept(source: Checkpoint) -> dict[int, Tensor]:
    """Epoch → θ of every checkpoint that the training of this one kept, this one included."""
    key = registered.key(source.model_id)
    kept = {**dict(registered.trajectory(key) if key else ()), source.epoch: source.model_id}
    thetas = {}
    for epoch, model_id in sorted(kept.items()):
        address, trusted = f"models:/{model_id}", tuple(source.trusted)
        same = model_id == source.model_id
        checkpoint = (
            source if same else registry.fetch(address, device=source.device, trusted=trusted)
        )
        thetas[epoch] = checkpoint.theta
    return thetas


def probe_params(
    sources: Sequence[Checkpoint], resolved: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The parameters that a probe's run logs.

    Args:
        sources: The checkpoints, one or two, or three for a plane.
        resolved: All options of the probe.
        seed: Of its randomness.
    """
    recipe = sources[0].recipe
    params: dict[str, Any] = {
        "project": recipe.project,
        "optimizer": recipe.optimizer,
        "seed": recipe.seed,
        "model": recipe.model.name,
        "dataset": recipe.dataset.name,
        "n_samples": sources[0].landscape.n_samples,
        "rng_seed": seed,
        "checkpoint": sources[0].run_id,
    }
    for letter, source in zip("bc", sources[1:], strict=False):
        params |= {
            f"optimizer_{letter}": source.recipe.optimizer,
            f"seed_{letter}": source.recipe.seed,
            f"checkpoint_{letter}": source.run_id,
        }
    return params | resolved

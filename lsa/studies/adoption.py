"""Checkpoints that other code trained, registered so that every probe and study measures them.

What rebuilds the landscape travels by name: the network's factory, the data and the loss. Their
packages run where somebody names or trusts them, as those of lsa's own trainings do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa import project as projects
from lsa.landscape.batches import Batches, original
from lsa.probe import Metric, Result
from lsa.project import Recipe
from lsa.runtime import arguments, provenance
from lsa.runtime.errors import InputError, first_line
from lsa.studies import load, steps
from lsa.tracking import (
    foreign_models,
    recording,
    registered,
    registry,
    results,
    runs,
    serial,
    settings,
)
from lsa.tracking.checkpoint import Checkpoint, load_data
from lsa.tracking.numbers import flat
from lsa.training import foreign, optimizers, recipes
from lsa.training import train as training
from lsa.training.data import Data

Part = str | Mapping[str, Any]  # `package:name`, or that as `name` with options
FEW = 8  # samples on which two networks are compared
NAME = "theirs"


@settings.restored()
def register(
    model: nn.Module,
    *,
    factory: Part,
    data: Part,
    project: str,
    loss: Part = "cross_entropy",
    objective: Part | None = None,
    optimizer: Optimizer | None = None,
    name: str = NAME,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int | None = None,
    samples: int | str = 2048,
    device: str = "auto",
) -> Result:
    """Register a trained network; its run ID is what `checkpoint=` takes.

    The caller names the packages, and so trusts them; elsewhere they need `--trust`.

    Args:
        model: The trained network. Neither it nor its optimizer is changed.
        factory: What makes the same network without its weights, `package:function` or
            `{"name": "package:function", **options}`. A function of lsa or torch, too.
        data: What makes its data, as `lsa.training.data.load` takes it, or with an objective its
            batches, as `lsa.training.data.streams` does.
        project: Under which it is filed, and compared with others.
        loss: As `lsa.training.losses.build` takes it: `(outputs, targets) → scalar`, a mean.
        objective: Instead of a loss, `(model, batch) → lsa.Terms`, as
            `lsa.training.losses.objective` takes it: `hf`, `per_token`, or your own.
        optimizer: That trained it, for `preconditioned`.
        name: What the project calls this way of training.
        seed: Of the training.
        epoch: After which the weights were taken.
        batch_size: Samples per step of the training, for `preconditioned`.
        samples: On which the landscape is measured, a fixed subset, or `all`.
        device: Where the data and the comparison are computed.

    Returns:
        The registering step; `run_id` and `address` name the checkpoint.

    Raises:
        InputError: The factory's network does not take the weights, or gives other outputs.
    """
    rule = foreign.rule_of(optimizer) if optimizer else None
    parts = {"model": factory, "dataset": data, "loss": loss, "objective": objective, "rule": rule}
    recipe = _recipe(parts, project, name, seed, epoch, batch_size, samples)
    device = load.device_of(device)
    trusted = projects.trusted_by(recipe)
    split = load_data(recipe, device, trusted)
    with evaluated(optimizer):
        named = foreign.fitted(
            model.state_dict(keep_vars=True), recipes.network(recipe, split, trusted)
        )
        weights = {key: value.detach().cpu().clone() for key, value in named.items()}
        state = foreign.optimizer_state(optimizer, named) if optimizer else {}
        source = _checkpoint(recipe, epoch, weights, state, device)
        _check_same(source, model)
        return _registered(source)


@settings.restored()
def adopt(
    source: str,
    *,
    factory: Part,
    data: Part,
    project: str,
    loss: Part = "cross_entropy",
    objective: Part | None = None,
    rule: Part | None = None,
    prefix: str | None = None,
    name: str = NAME,
    seed: int = 0,
    epoch: int | None = None,
    batch_size: int | None = None,
    samples: int | str = 2048,
    device: str = "auto",
) -> Result:
    """Register weights out of a file or an MLflow model; reading them runs none of its code.

    Args:
        source: `.pt`, `.pth`, `.bin`, `.safetensors`, a Lightning `.ckpt`, a Hugging Face folder,
            or an MLflow model of flavour pytorch, `models:/…` or `runs:/…`.
        factory: As for `register`, as are the arguments not named here.
        data: The same.
        project: The same.
        loss: The same.
        objective: The same.
        rule: Class and options of the optimizer whose state the file holds, such as `AdamW`.
        prefix: Before the network's names in the file; found where there is one that fits.
        name: As for `register`.
        seed: The same.
        epoch: The file's where None.
        batch_size: As for `register`.
        samples: The same.
        device: The same.

    Raises:
        InputError: There is nothing to read, or it does not fit the factory's network.
    """
    if source.startswith(("models:/", "runs:/")):
        content = foreign_models.read(source)
    else:
        content = foreign.read(Path(source))
    epoch = (content.epoch or 0) if epoch is None else epoch
    parts = {"model": factory, "dataset": data, "loss": loss, "objective": objective, "rule": rule}
    recipe = _recipe(parts, project, name, seed, epoch, batch_size, samples)
    device = load.device_of(device)
    trusted = projects.trusted_by(recipe)
    network = recipes.network(recipe, load_data(recipe, device, trusted), trusted)
    weights = foreign.fitted(content.weights, network, prefix)
    if rule:  # names what there is
        named = recipe.rule
        optimizers.build(named.name, network.parameters(), trusted=trusted, **named.options)
    state = content.optimizer if rule and content.optimizer else {}
    return _registered(_checkpoint(recipe, epoch, weights, state, device))


def _recipe(
    parts: Mapping[str, Part | None],
    project: str,
    name: str,
    seed: int,
    epoch: int,
    batch_size: int | None,
    samples: int | str,
) -> Recipe:
    """The description that rebuilds the landscape.

    Raises:
        InputError: A part that breaks a rule of project files, or an epoch below 0.
    """
    epoch = arguments.whole_number("epoch", epoch)
    named = {
        section: {"name": part} if isinstance(part, str) else dict(part)
        for section, part in parts.items()
        if part is not None
    }
    fixed = {
        "project": project,
        "optimizer": name,
        "seed": seed,
        "train": {"epochs": max(1, epoch)},
        "landscape": {"samples": samples},
        "origin": {"batch_size": batch_size},
    }
    rule = {"rule": {"name": projects.ELSEWHERE}}
    return projects.validated(Recipe, "the checkpoint's description", rule | named | fixed)


def _checkpoint(
    recipe: Recipe, epoch: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], device: str
) -> Checkpoint:
    trusted = projects.trusted_by(recipe)
    return Checkpoint(
        recipe=recipe,
        epoch=epoch,
        weights=weights,
        optimizer_state=state,
        data_hash=load_data(recipe, device, trusted).hash,
        versions=provenance.versions(),
        device=device,
        trusted=trusted,
    )


def _registered(source: Checkpoint) -> Result:
    """Log and register a checkpoint, or find that it has been."""
    recipe = source.recipe
    _ = source.model  # does not fit: nothing is tracked then
    content = {
        "recipe": recipe.model_dump(),
        "data": source.data_hash,
        "weights": serial.digest(dict(source.weights)),
    }
    key = steps.step_key("register", "lsa.studies.adoption", content)

    def log() -> Result:
        metrics = _evaluated(source)  # cannot be: nothing is tracked then
        title = steps.title("register", recipe)
        tags = steps.step_tags("train", recipe) | {"lsa.key": key, "lsa.origin": projects.ELSEWHERE}
        with recording.run(
            title,
            experiment=recipe.project,
            tags=tags,
            device=source.device,
            deliver=registry.deliver,
        ) as opened:
            opened.params(projects.train_params(recipe))
            opened.json(recipe.model_dump(), "recipe.json")
            registry.keep(opened, source, flat(results.FINAL, metrics), key, final=True)
        address = opened.tag("lsa.checkpoint")
        return Result(metrics, probe=results.TRAIN, run_id=opened.id, checkpoint=address)

    return steps.once(key, log, reuse=True)


def listed(reference: str, wanted: Recipe) -> Result:
    """The registering step of a checkpoint that a project lists.

    Args:
        reference: As `checkpoint=` takes it.
        wanted: Of the project's optimizer and seed.

    Raises:
        InputError: It is not there, or is registered as something else.
    """
    run_id = registered.training(registered.resolve(reference))
    tags = runs.read(run_id).tags
    names = [tags.get(key, "") for key in ("project", "optimizer", "seed")]
    if names != [wanted.project, wanted.optimizer, str(wanted.seed)]:
        raise InputError(
            f"checkpoint {reference} is registered as {names[0]}.{names[1]} seed {names[2]}; "
            f"register it as {wanted.project}.{wanted.optimizer} seed {wanted.seed}"
        )
    return results.read(run_id)


@contextlib.contextmanager
def evaluated(optimizer: Optimizer | None) -> Iterator[None]:
    """Parameters as schedule-free optimizers evaluate them; afterwards exactly as they were."""
    groups = optimizer.param_groups if optimizer else []
    if not any(group.get("train_mode") for group in groups):
        yield
        return
    assert optimizer is not None
    parameters = [p for group in groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizers.switch(optimizer, training=False)
    try:
        yield
    finally:
        optimizers.switch(optimizer, training=True)
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def _evaluated(source: Checkpoint) -> dict[str, Metric]:
    """Loss of a checkpoint on both whole splits, and accuracy where it has one.

    Raises:
        InputError: The network does not take its data, for one is of another precision.
    """
    try:
        return training.final_metrics(source.validation, source.training)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        kinds = ", ".join(sorted({str(w.dtype) for w in source.weights.values()}))
        raise InputError(
            f"the weights are {kinds}, and the network does not take its data with them "
            f"({first_line(error)}); give weights and data of one precision"
        ) from error


def _check_same(source: Checkpoint, theirs: nn.Module) -> None:
    """Refuse a factory whose network computes something else from the same weights.

    Raises:
        InputError: The outputs, or an objective's loss of a batch, differ by more than rounding.
    """
    modes = [(module, module.training) for module in theirs.modules()]
    theirs.eval()
    try:
        with torch.no_grad():
            a, b = (_computed(source, model) for model in (theirs, source.model))
    finally:
        for module, mode in modes:
            module.training = mode
    if a.shape != b.shape or (a - b).abs().max() > 1e-3 * a.abs().max().clamp_min(1e-12):
        raise InputError(
            "the factory's network gives other outputs than the model with the same weights; name "
            "the factory, with the options, that made the model"
        )


def _computed(source: Checkpoint, model: nn.Module) -> Tensor:
    """A model's outputs for a few samples, or its loss on the first batch."""
    split = source.data
    device = next(model.parameters()).device
    if isinstance(split, Data):
        return model(split.x_train[:FEW].to(device)).double().cpu()
    first = next(iter(Batches(split.train, device)))
    objective = recipes.objective_of(source.recipe, source.trusted)
    return objective(model, original(first.content)).total.double().cpu()

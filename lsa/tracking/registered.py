"""What MLflow's model registry holds: checkpoints found by run, project or address, and listed.

Nothing here reads a checkpoint's files, so that what only asks waits for no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from lsa import project as projects
from lsa.runtime.documents import whole_number
from lsa.runtime.errors import InputError, first_line
from lsa.tracking.runs import by_prefix, deleted_trainings, is_deleted, logged_models
from lsa.tracking.store import away, client, explained, insist, quoted, where

FLAVOR = "lsa"
LISTED = ("project", "optimizer", "seed", "epoch")  # tags of every version that lsa registers


def registered_name(project: str, optimizer: str) -> str:
    """Name of the registered model of a project and optimizer."""
    return f"{project}.{optimizer}"


def trajectory(key: str) -> list[tuple[int, str]]:
    """Epoch and model id of every checkpoint kept of the training with that key, in order.

    Of a training that was repeated, each epoch's newest counts; of one that was deleted, none does.
    """
    sealed = _sealed(f"tags.`lsa.key` = '{quoted(key)}'")
    epochs = {whole_number(model.tags.get("epoch", "")): model.model_id for model in sealed}
    return sorted((epoch, model_id) for epoch, model_id in epochs.items() if epoch is not None)


def kept(project: str) -> tuple[dict[str, str], dict[str, dict[int, str]]]:
    """All checkpoints of a project in one search, where `key` and `trajectory` take one each.

    Returns:
        Model id → key of its training, and that key → epoch → model id, the newest.
    """
    keys: dict[str, str] = {}
    epochs: dict[str, dict[int, str]] = {}
    for model in _sealed(f"tags.project = '{quoted(project)}' and tags.`lsa.key` != ''"):
        keys[model.model_id] = training = model.tags["lsa.key"]
        if (epoch := whole_number(model.tags.get("epoch", ""))) is not None:
            epochs.setdefault(training, {})[epoch] = model.model_id
    return keys, epochs


def numbers_by_epoch(project: str) -> dict[str, dict[int, dict[str, float]]]:
    """Key of a training → epoch → the numbers logged on the checkpoint that it kept there."""
    numbers_by_epoch: dict[str, dict[int, dict[str, float]]] = {}
    for model in _sealed(f"tags.project = '{quoted(project)}' and tags.`lsa.key` != ''"):
        if (epoch := whole_number(model.tags.get("epoch", ""))) is not None:
            numbers_by_epoch.setdefault(model.tags["lsa.key"], {})[epoch] = _newest(model.metrics)
    return numbers_by_epoch


def _sealed(criteria: str) -> Iterator[Any]:
    """Logged models of trainings that are not deleted, the oldest first."""
    deleted = deleted_trainings()
    return (model for model in logged_models(criteria) if model.source_run_id not in deleted)


def key(model_id: str) -> str:
    """Key of the training that kept a checkpoint; empty for one made before there were any."""
    return client().get_logged_model(model_id).tags.get("lsa.key", "")


def numbers(model_id: str) -> dict[str, float]:
    """The newest value of every metric that was logged on a checkpoint."""
    return _newest(client().get_logged_model(model_id).metrics)


def _newest(logged: Iterable[Any] | None) -> dict[str, float]:
    return {m.key: m.value for m in sorted(logged or (), key=lambda m: m.timestamp)}


def resolve(reference: str) -> str:
    """The address of the checkpoint meant by a run ID or any address that MLflow knows.

    Args:
        reference: Run ID or the beginning of one, `runs:/…`, `models:/name/version`,
            `models:/name@alias`, `models:/m-…`.

    Raises:
        InputError: Nothing registered under it; says what was looked for.
    """
    if reference.startswith(("models:/", "runs:/")):
        return reference
    versions = firsts(client().search_model_versions(f"run_id='{quoted(reference)}'"))
    if versions:
        newest = versions[-1]
        if is_deleted(newest.run_id):
            raise InputError(
                f"no checkpoint {reference!r}: its training is deleted; restore the run in the UI, "
                f"or give models:/{newest.name}/{newest.version}"
            )
        return f"models:/{newest.name}/{newest.version}"
    try:
        run = by_prefix(reference)
    except InputError as error:
        raise InputError(f"no checkpoint {reference!r}: {error}") from None
    if run.run_id != reference:
        return resolve(run.run_id)
    raise InputError(
        f"no checkpoint {reference!r}: it is a run of step {run.tags.get('lsa.step', 'unknown')} "
        "and has registered none; give the ID of a training run, models:/name/version or "
        "models:/name@alias"
    )


def find(project: str, optimizer: str, seed: int, reference: str = "") -> str:
    """The address of the newest registered checkpoint of a project, optimizer and seed.

    Those of deleted trainings do not count.

    Args:
        project: Its name.
        optimizer: As the project names it.
        seed: Of the training.
        reference: What a command line calls the project, a path perhaps; its name by default.

    Raises:
        InputError: There is none; says what there is and the command that makes one.
    """
    name = registered_name(project, optimizer)
    criteria = f"name='{quoted(name)}' and tags.seed='{seed}'"
    versions = client().search_model_versions(criteria)
    for version in reversed(firsts(versions)):
        if not is_deleted(version.run_id):
            return f"models:/{version.name}/{version.version}"
    others = client().search_model_versions(f"tags.project='{quoted(project)}'", max_results=1000)
    deleted = deleted_trainings()
    existing = sorted(
        {
            f"{v.tags['optimizer']} (seed {v.tags['seed']})"
            for v in others
            if _ours(v.tags) and v.run_id not in deleted
        }
    )
    raise InputError(
        f"no checkpoint with project={project}, optimizer={optimizer}, seed={seed} in {where()}; "
        f"there is {', '.join(existing[:12]) or 'none of this project'}; make one with: "
        f"lsa train --project {shlex.quote(reference or project)} --optimizer {optimizer} "
        f"--seed {seed}"
    )


def locate(
    reference: str | None, name: str | None, optimizer: str | None, seed: int | None
) -> tuple[str, tuple[str, ...]]:
    """The address of a checkpoint that a command names, and the packages that its project trusts.

    Args:
        reference: Run ID, alias, `models:/…` address, or None.
        name: Project; used with an optimizer alone.
        optimizer: As the project names it.
        seed: Of the training; the project's first by default.

    Raises:
        InputError: Both ways of naming are given, or neither, or there is no such checkpoint.
    """
    if reference:
        if optimizer:
            raise InputError(
                f"both checkpoint={reference} and optimizer={optimizer} are given; give one"
            )
        return resolve(reference), ()
    if not optimizer:
        raise InputError(
            "no checkpoint is named; give optimizer=… (and project, seed), or checkpoint=<run ID>"
        )
    setting = projects.load(name or projects.DEFAULT)
    recipe = setting.recipe(optimizer, seed)
    address = find(setting.name, optimizer, recipe.seed, setting.reference)
    return address, projects.trusted_by(recipe)


def training(address: str) -> str:
    """ID of the run that trained a checkpoint.

    Raises:
        InputError: There is no such checkpoint.
    """
    return info(address).run_id or ""


def info(address: str) -> Model:
    """MLflow's description (`MLmodel`) of the checkpoint at an address.

    Raises:
        InputError: There is none, it is damaged, or lsa did not write it.
    """
    try:
        info = insist(lambda: Model.load(address))
    except (MlflowException, OSError) as error:
        raise missing(address, error) from None
    except Exception as error:  # MLflow takes the file as it is: whatever it holds may go wrong
        raise InputError(
            f"the MLmodel file of {address} is damaged ({error}); train again or restore the store"
        ) from None
    if FLAVOR not in info.flavors:
        raise InputError(
            f"{address} is a model of flavour {', '.join(map(str, info.flavors))}, not an lsa "
            "checkpoint; register one with lsa train"
        )
    return info


def missing(address: str, error: Exception) -> InputError:
    """The error for an address without a checkpoint."""
    if away(error):
        return InputError(f"cannot fetch {address}: {explained(error)}")
    return InputError(
        f"no checkpoint at {address} in {where()} ({first_line(error)}); list them with "
        "lsa checkpoints, or make one with lsa train"
    )


@dataclass(frozen=True)
class Listed:
    """A registered checkpoint and the numbers that were logged on it."""

    address: str
    project: str
    optimizer: str
    seed: int
    epoch: int
    run_id: str  # of its training
    numbers: Mapping[str, float]


def listing(project: str | None = None) -> list[Listed]:
    """Every registered checkpoint, of one project or of all, but for those of deleted trainings."""
    criteria = f"tags.project = '{quoted(project)}'" if project else "tags.epoch != ''"
    numbers, deleted = _registered_numbers(criteria), deleted_trainings()
    versions = [v for v in every(criteria) if v.run_id not in deleted]
    return [
        Listed(
            address=f"models:/{v.name}/{v.version}",
            project=v.tags["project"],
            optimizer=v.tags["optimizer"],
            seed=int(v.tags["seed"]),
            epoch=int(v.tags["epoch"]),
            run_id=v.run_id,
            numbers=numbers.get(v.source, {}),
        )
        for v in sorted(firsts(versions), key=lambda v: (v.name, int(v.version)))
    ]


def every(criteria: str = "tags.epoch != ''") -> Iterator[Any]:
    """Versions that lsa has registered, doubles too."""
    token = None
    while True:
        page = client().search_model_versions(criteria, max_results=1000, page_token=token)
        yield from (version for version in page if _ours(version.tags))
        token = page.token
        if not token:
            return


def firsts(versions: Iterable[Any]) -> list[Any]:
    """Registered versions in the order of their numbers, each model's first under a name alone.

    A server that answers late may register a model once more than it was told.
    """
    first: dict[tuple[str, str], Any] = {}
    for version in sorted(versions, key=lambda version: int(version.version)):
        registers_model = version.source.startswith("models:/")
        first.setdefault(
            (version.name, version.source if registers_model else version.version), version
        )
    return sorted(first.values(), key=lambda version: int(version.version))


def _ours(tags: Mapping[str, str]) -> bool:
    """Whether a version has the tags of one that lsa registered: others may share a store."""
    numbers = [whole_number(tags.get(name, "")) for name in LISTED[2:]]
    return all(name in tags for name in LISTED) and None not in numbers


def _registered_numbers(criteria: str) -> dict[str, dict[str, float]]:
    """Source of a registered version → the numbers of its logged model."""
    criteria = f"{criteria} and tags.`{MLFLOW_MODEL_VERSIONS}` != ''"
    return {
        f"models:/{model.model_id}": _newest(model.metrics) for model in logged_models(criteria)
    }

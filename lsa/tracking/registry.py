"""Checkpoints on their way into MLflow's model registry, and back.

What is in there is found by `lsa.tracking.registered`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from lsa.project import first_rule
from lsa.runtime.errors import InputError
from lsa.tracking import checkpoint as checkpoints
from lsa.tracking import runs, spool, store
from lsa.tracking.checkpoint import Checkpoint
from lsa.tracking.registered import FLAVOR, LISTED, info, missing, registered_name, trajectory
from lsa.tracking.run import Run, dataset_key, experiment_named, finite
from lsa.tracking.store import client, quoted

FILES, ABOUT = "files", "about.json"  # of a checkpoint in a spool entry
ON_THE_WAY = " on the way"  # experiment of a project's checkpoints that are not the last
SHA256 = "lsa.sha256"  # tag of a logged model: of its checkpoint's content


@dataclass(frozen=True)
class About:
    """Metadata of a checkpoint in a spool entry, logged with its files."""

    name: str
    register: str | None  # name under which it is registered, if it is
    epoch: int
    key: str  # of the training
    tags: dict[str, str]
    metrics: list[spool.LoggedMetric]


class Flavor:
    """The MLflow flavour of a checkpoint: our files beside an `MLmodel`, nothing to unpickle."""

    @staticmethod
    def save_model(path: str, mlflow_model: Model, files: Path, **_: Any) -> None:
        """Copy the checkpoint's files to the folder that MLflow names."""
        folder = Path(path)
        shutil.copytree(files, folder, dirs_exist_ok=True)
        mlflow_model.add_flavor(FLAVOR, format=checkpoints.FORMAT, config=checkpoints.CONFIG)
        mlflow_model.save(str(folder / "MLmodel"))
        # In the database too: whoever may write artifacts alone cannot make up another content.
        sha256 = checkpoints.recorded(folder)
        client().set_logged_model_tags(mlflow_model.model_id or "", {SHA256: sha256})


# --- from a run's spool entry into the store ------------------------------------------------------


def keep(
    opened: Run, checkpoint: Checkpoint, values: Mapping[str, float], key: str, *, final: bool
) -> None:
    """Write a checkpoint and its evaluation into a run's entry; `deliver` sends it.

    Args:
        opened: The training's run.
        checkpoint: Without a `model_id`, which the store gives.
        values: Logged on the run and on the checkpoint.
        key: Of the training.
        final: Whether it is to be registered.
    """
    recipe = checkpoint.recipe
    opened.not_finite(values)
    on_the_way = "" if final else f"-epoch{checkpoint.epoch}"
    with opened.entry.checkpoint(f"{checkpoint.epoch:06}") as folder:
        (folder / FILES).mkdir()
        checkpoints.save(checkpoint, folder / FILES)
        about = About(
            name=f"{recipe.optimizer}-s{recipe.seed}{on_the_way}",
            register=registered_name(recipe.project, recipe.optimizer) if final else None,
            epoch=checkpoint.epoch,
            key=key,
            tags=_tags(checkpoint),
            metrics=finite(values, checkpoint.epoch, dataset_key(checkpoint)),
        )
        (folder / ABOUT).write_text(json.dumps(asdict(about)), encoding="utf-8")


def _about(folder: Path) -> About:
    """The description of the checkpoint in a folder, as it is logged.

    Raises:
        Damaged: It is not what `keep` wrote.
    """
    try:
        stored = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return pydantic.TypeAdapter(About).validate_python(stored)
    except pydantic.ValidationError as error:
        raise spool.Damaged(f"{folder / ABOUT} is damaged ({first_rule(error)})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise spool.Damaged(f"{folder / ABOUT} is damaged ({error})") from None


def check(entry: spool.Entry) -> None:
    """Compare an entry's checkpoints with what was written.

    Raises:
        Damaged: One was altered, cut short, or lacks a file.
    """
    for folder in entry.checkpoints():
        _about(folder)
        try:
            checkpoints.read(folder / FILES)
        except InputError as error:
            raise spool.Damaged(f"{folder}: {error}") from None


def deliver(opened: Run) -> None:
    """Send everything in a run's entry of the spool, with its checkpoints.

    Each checkpoint is logged once, also where an earlier call was cut short.

    Raises:
        Damaged: A checkpoint's files are not those that were written.
    """
    opened.send()
    for folder in opened.entry.checkpoints():
        about = _about(folder)
        if about.register is None and about.epoch in dict(trajectory(about.key)):
            shutil.rmtree(folder)  # an earlier run of this training has logged it
            continue
        # A second try makes the model anew: MLflow cannot go on with one that is linked already.
        model_id = _logged(opened.id, about) or store.insist(
            lambda about=about, files=folder / FILES: log(opened.id, about, files)
        )
        runs.remove_models(opened.id, about.name, but=model_id)
        fields: list[dict[str, Any]] = [{**row, "model_id": model_id} for row in about.metrics]
        metrics = [Metric(**row) for row in fields]
        client().log_batch(opened.id, metrics=metrics)
        if about.register:
            address = _registered(opened.id, about.register, model_id, about.tags)
            opened.tags({"lsa.checkpoint": address, "lsa.model_id": model_id})
        seal(model_id, about.key)
        if about.register is None:
            shutil.rmtree(folder)
    opened.send()


def _logged(run_id: str, about: About) -> str | None:
    """The model of a checkpoint whose files are in the store."""
    models = runs.models_of(run_id, about.name)
    return next((m.model_id for m in models if m.status == LoggedModelStatus.READY), None)


def log(run_id: str, about: About, files: Path) -> str:
    """Log a checkpoint's files as an MLflow model of a run.

    Args:
        run_id: Of the training.
        about: Name, tags and epoch of the checkpoint.
        files: Folder of its files.

    Returns:
        The model's id.
    """
    run = client().get_run(run_id)
    experiment = run.info.experiment_id
    if about.register is None:  # or it would hide the last ones on the UI's page of models
        experiment = experiment_named(client().get_experiment(experiment).name + ON_THE_WAY)
    made = client().create_logged_model(  # Model.log would make it in another experiment
        experiment,
        name=about.name,
        source_run_id=run_id,
        tags=about.tags,
        params={**about.tags, **run.data.params},
        model_type="lsa.checkpoint",
    )
    Model.log(
        artifact_path=None,
        flavor=Flavor,
        step=about.epoch,
        run_id=run_id,
        model_id=made.model_id,
        files=files,
    )
    return made.model_id


def _registered(run_id: str, name: str, model_id: str, tags: Mapping[str, str]) -> str:
    """Register a model of a run, unless it is; the version's address.

    A request whose answer was lost is sent again, and makes a second version: the first stays.
    """
    if not _versions(run_id, model_id):
        with contextlib.suppress(MlflowException):  # it exists
            client().create_registered_model(
                name, tags={k: tags[k] for k in ("project", "optimizer")}
            )
        client().create_model_version(
            name, f"models:/{model_id}", run_id, tags=dict(tags), model_id=model_id
        )
    version, *doubles = _versions(run_id, model_id)
    for double in doubles:
        client().delete_model_version(name, double.version)
    link = json.dumps([{"name": name, "version": version.version}])  # what the UI's table reads
    client().set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})
    return f"models:/{name}/{version.version}"


def present(run_id: str, address: str) -> str:
    """The address of a finished training's checkpoint, registered anew where it is not any more.

    Somebody may have deleted the version, or another registry may be in use.

    Args:
        run_id: The training.
        address: Where it was registered.

    Raises:
        Broken: The store does not have the checkpoint any more.
        InputError: The registry does not take it.
    """
    try:
        known = client().search_model_versions(f"run_id='{quoted(run_id)}'")
        if address in (f"models:/{version.name}/{version.version}" for version in known):
            return address
        model_id = client().get_run(run_id).data.tags.get("lsa.model_id", "")
        model = client().get_logged_model(model_id)
        tags = {name: model.tags[name] for name in LISTED}
        name = registered_name(tags["project"], tags["optimizer"])
        address = _registered(run_id, name, model.model_id, tags)
        client().set_tag(run_id, "lsa.checkpoint", address)
        return address
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise runs.Broken(f"the checkpoint of run {run_id} is not in the store") from None
        raise InputError(store.explained(error)) from None
    except KeyError:
        raise runs.Broken(f"run {run_id} names a model that is no checkpoint") from None


def _versions(run_id: str, model_id: str) -> list[Any]:
    """Registered versions of a run's model, the first one first."""
    known = client().search_model_versions(f"run_id='{quoted(run_id)}'")
    ours = (version for version in known if version.source == f"models:/{model_id}")
    return sorted(ours, key=lambda version: int(version.version))


def _tags(checkpoint: Checkpoint) -> dict[str, str]:
    recipe = checkpoint.recipe
    return {
        "project": recipe.project,
        "optimizer": recipe.optimizer,
        "seed": str(recipe.seed),
        "epoch": str(checkpoint.epoch),
    }


def seal(model_id: str, key: str) -> None:
    """Make a checkpoint part of the trajectory of the training with that key.

    Called once its files and numbers are stored: what a killed process leaves half done is in no
    trajectory.
    """
    client().set_logged_model_tags(model_id, {"lsa.key": key})


def fetch(address: str, *, device: str = "cpu", trusted: Sequence[str] = ()) -> Checkpoint:
    """Download a checkpoint by its address and read it.

    Args:
        address: `models:/…`.
        device: Where its landscape computes.
        trusted: Packages whose factories may be imported.

    Raises:
        InputError: It is not there, or is not an lsa checkpoint.
    """
    known = info(address)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            got = store.insist(lambda: download_artifacts(address, dst_path=scratch))
            _check_complete(Path(got), known)
            return checkpoints.read(
                Path(got),
                device=device,
                trusted=trusted,
                model_id=known.model_id or "",
                run_id=known.run_id or "",
            )
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a version says where its files are: MLflow raises of any kind
        raise missing(address, error) from None


def _check_complete(folder: Path, info: Model) -> None:
    """Compare downloaded files with what the store's database knows of them.

    Raises:
        InputError: They are of another model or run, or were altered.
    """
    if not info.model_id:  # logged as the artifact of a run
        return
    known = client().get_logged_model(info.model_id)
    sha256 = known.tags.get(SHA256)  # none of what was logged before there was one
    if known.source_run_id != info.run_id or sha256 not in (None, checkpoints.recorded(folder)):
        raise InputError(
            f"the files of checkpoint {info.model_id} are not those that were logged: they were "
            "altered or replaced; train again or restore the store's artifacts"
        )

"""Checkpoints in MLflow's model registry: registered, found and fetched."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from lsa.errors import InputError
from lsa.memory import checkpoint as checkpoints
from lsa.memory.checkpoint import Checkpoint
from lsa.memory.runs import whole
from lsa.memory.store import away, client, experiments, explained, quoted, uri
from lsa.memory.tracking import Run, dataset_key, finite

FLAVOR = "lsa"
FILES, ABOUT = "files", "about.json"  # of a checkpoint in a spool entry
PAGE = 1000  # models of one search
SHA256 = "lsa.sha256"  # tag of a logged model: of its checkpoint's content
LISTED = ("project", "optimizer", "seed", "epoch")  # tags of every version that lsa registers


class Flavor:
    """The MLflow flavour of a checkpoint: our files beside an `MLmodel`, nothing to unpickle."""

    @staticmethod
    def save_model(path: str, mlflow_model: Model, files: Path, **_: Any) -> None:
        """Put the checkpoint's files where MLflow wants it."""
        folder = Path(path)
        shutil.copytree(files, folder, dirs_exist_ok=True)
        mlflow_model.add_flavor(FLAVOR, format=checkpoints.FORMAT, config=checkpoints.CONFIG)
        mlflow_model.save(str(folder / "MLmodel"))
        # In the database too: whoever may write artifacts alone cannot make up another content.
        sha256 = checkpoints.recorded(folder)
        client().set_logged_model_tags(mlflow_model.model_id or "", {SHA256: sha256})


def registered_name(project: str, optimizer: str) -> str:
    """Name of the registered model of a project and optimizer."""
    return f"{project}.{optimizer}"


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
        about = {
            "name": f"{recipe.optimizer}-s{recipe.seed}{on_the_way}",
            "register": registered_name(recipe.project, recipe.optimizer) if final else None,
            "epoch": checkpoint.epoch,
            "key": key,
            "tags": _tags(checkpoint),
            "metrics": finite(values, checkpoint.epoch, dataset_key(checkpoint)),
        }
        (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def deliver(opened: Run) -> None:
    """Send all that a run's entry holds, its checkpoints too: each once, however often this ends
    early and is repeated."""
    opened.send()
    for folder in opened.entry.checkpoints():
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["register"] is None and about["epoch"] in dict(trajectory(about["key"])):
            shutil.rmtree(folder)  # an earlier run of this training has logged it
            continue
        model_id = _logged(opened.id, about) or log(opened.id, about, folder / FILES)
        metrics = [Metric(**one, model_id=model_id) for one in about["metrics"]]
        client().log_batch(opened.id, metrics=metrics)
        if about["register"]:
            address = _registered(opened.id, about["register"], model_id, about["tags"])
            opened.tags({"lsa.checkpoint": address, "lsa.model_id": model_id})
        seal(model_id, about["key"])
        if about["register"] is None:
            shutil.rmtree(folder)
    opened.send()


def _logged(run_id: str, about: Mapping[str, Any]) -> str | None:
    """The model of a checkpoint whose files are in the store."""
    criteria = f"source_run_id = '{quoted(run_id)}' and name = '{quoted(about['name'])}'"
    found = client().search_logged_models(experiments(), criteria)
    return next((m.model_id for m in found if m.status == LoggedModelStatus.READY), None)


def log(run_id: str, about: Mapping[str, Any], files: Path) -> str:
    """Log a checkpoint's files as a model of a run; the model's id."""
    run = client().get_run(run_id)
    made = client().create_logged_model(  # Model.log would make it in another experiment
        run.info.experiment_id,
        name=about["name"],
        source_run_id=run_id,
        tags=about["tags"],
        params={**about["tags"], **run.data.params},
        model_type="lsa.checkpoint",
    )
    Model.log(
        artifact_path=None,
        flavor=Flavor,
        step=about["epoch"],
        run_id=run_id,
        model_id=made.model_id,
        files=files,
    )
    return made.model_id


def _registered(run_id: str, name: str, model_id: str, tags: Mapping[str, str]) -> str:
    """Register a model of a run, unless it is; the version's address."""
    source = f"models:/{model_id}"
    known = client().search_model_versions(f"run_id='{quoted(run_id)}'")
    version = next((v for v in known if v.source == source), None)
    if version is None:
        with contextlib.suppress(MlflowException):  # it exists
            client().create_registered_model(
                name, tags={k: tags[k] for k in ("project", "optimizer")}
            )
        version = client().create_model_version(
            name, source, run_id, tags=dict(tags), model_id=model_id
        )
    link = json.dumps([{"name": name, "version": version.version}])  # what the UI's table reads
    client().set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})
    return f"models:/{name}/{version.version}"


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


def trajectory(key: str) -> list[tuple[int, str]]:
    """Epoch and model id of every checkpoint kept of the training with that key, in order.

    Of a training that was repeated, each epoch's newest counts.
    """
    found = _models(f"tags.`lsa.key` = '{quoted(key)}'")
    return sorted({int(model.tags["epoch"]): model.model_id for model in found}.items())


def kept(project: str) -> tuple[dict[str, str], dict[str, dict[int, str]]]:
    """All checkpoints of a project in one search, where `key` and `trajectory` take one each.

    Returns:
        Model id → key of its training, and that key → epoch → model id, the newest.
    """
    keys: dict[str, str] = {}
    epochs: dict[str, dict[int, str]] = {}
    for model in _models(f"tags.project = '{quoted(project)}' and tags.`lsa.key` != ''"):
        keys[model.model_id] = training = model.tags["lsa.key"]
        epochs.setdefault(training, {})[int(model.tags["epoch"])] = model.model_id
    return keys, epochs


def _models(criteria: str) -> Iterator[Any]:
    """Logged models, the oldest first."""
    token = None
    order = [{"field_name": "creation_timestamp", "ascending": True}]
    while True:
        page = client().search_logged_models(
            experiments(), criteria, max_results=PAGE, order_by=order, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


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
    versions = client().search_model_versions(f"run_id='{quoted(reference)}'")
    if versions:
        newest = max(versions, key=lambda version: int(version.version))
        return f"models:/{newest.name}/{newest.version}"
    try:
        found = whole(reference)
    except InputError as error:
        raise InputError(f"no checkpoint {reference!r}: {error}") from None
    if found.run_id != reference:
        return resolve(found.run_id)
    raise InputError(
        f"no checkpoint {reference!r}: it is a run of step {found.tags.get('lsa.step', 'unknown')} "
        "and has registered none; give the ID of a training run, models:/name/version or "
        "models:/name@alias"
    )


def find(project: str, optimizer: str, seed: int) -> str:
    """The address of the newest registered checkpoint of a project, optimizer and seed.

    Raises:
        InputError: There is none; says what there is and the command that makes one.
    """
    name = registered_name(project, optimizer)
    criteria = f"name='{quoted(name)}' and tags.seed='{seed}'"
    versions = client().search_model_versions(criteria)
    if versions:
        newest = max(versions, key=lambda version: int(version.version))
        return f"models:/{newest.name}/{newest.version}"
    others = client().search_model_versions(f"tags.project='{quoted(project)}'", max_results=1000)
    existing = sorted(
        {f"{v.tags['optimizer']} (seed {v.tags['seed']})" for v in others if _ours(v.tags)}
    )
    raise InputError(
        f"no checkpoint with project={project}, optimizer={optimizer}, seed={seed} in {uri()}; "
        f"there is {', '.join(existing[:12]) or 'none of this project'}; make one with: "
        f"lsa train --project {project} --optimizer {optimizer} --seed {seed}"
    )


def training(address: str) -> str:
    """ID of the run that trained a checkpoint.

    Raises:
        InputError: There is no such checkpoint.
    """
    return _info(address).run_id or ""


def fetch(address: str, *, device: str = "cpu", trusted: Sequence[str] = ()) -> Checkpoint:
    """Download a checkpoint by its address and read it.

    Raises:
        InputError: It is not there, or is not an lsa checkpoint.
    """
    info = _info(address)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(download_artifacts(address, dst_path=scratch))
            _check_whole(folder, info)
            return checkpoints.read(
                folder,
                device=device,
                trusted=trusted,
                model_id=info.model_id or "",
                run_id=info.run_id or "",
            )
    except (MlflowException, OSError) as error:
        raise _missing(address, error) from None


def _info(address: str) -> Model:
    """What MLflow knows of the checkpoint at an address."""
    try:
        info = Model.load(address)
    except (MlflowException, OSError) as error:
        raise _missing(address, error) from None
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


def _check_whole(folder: Path, info: Model) -> None:
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


def _missing(address: str, error: Exception) -> InputError:
    if away(error):
        return InputError(f"cannot fetch {address}: {explained(error)}")
    return InputError(
        f"no checkpoint at {address} in {uri()} ({str(error).splitlines()[0]}); list them with "
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
    """Every registered checkpoint, of one project or of all, in two searches."""
    criteria = f"tags.project = '{quoted(project)}'" if project else "tags.epoch != ''"
    numbers = _registered_numbers(criteria)
    versions, token = [], None
    while True:
        page = client().search_model_versions(criteria, max_results=1000, page_token=token)
        versions += [version for version in page if _ours(version.tags)]
        token = page.token
        if not token:
            break
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
        for v in sorted(versions, key=lambda v: (v.name, int(v.version)))
    ]


def _ours(tags: Mapping[str, str]) -> bool:
    """Whether a version has the tags of one that lsa registered: others may share a store."""
    return all(name in tags for name in LISTED) and all(tags[k].isdecimal() for k in LISTED[2:])


def _registered_numbers(criteria: str) -> dict[str, dict[str, float]]:
    """Source of a registered version → the numbers of its logged model."""
    criteria = f"{criteria} and tags.`{MLFLOW_MODEL_VERSIONS}` != ''"
    return {f"models:/{model.model_id}": _newest(model.metrics) for model in _models(criteria)}

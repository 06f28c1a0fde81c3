"""Read runs from MLflow, and end those whose processes died."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelStatus, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import get_local_path_or_none

from lsa.runtime import documents, provenance
from lsa.runtime.documents import whole_number
from lsa.runtime.errors import InputError
from lsa.tracking import store
from lsa.tracking.reading import Broken, reading
from lsa.tracking.store import client, experiments, quoted, shown, uri

_LATEST = ["attributes.start_time DESC"]
PAGE = 1000  # runs or models of one search
PARAM = "lsa.param."  # + name of a parameter: a tag that holds its value, not as it was typed
FORM = "lsa.form"  # tag of a training: `project.form` of its recipe
SAMPLES = "lsa.samples"  # tag of a measurement: the samples that were asked for, a number or all
NOT_FINITE = "lsa.not_finite."  # + name of the metric: a tag that holds its value


@dataclass(frozen=True)
class Done:
    """A finished run, read back."""

    run_id: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    seconds: float = 0.0  # from its start to its end
    experiment: str = ""
    data: str = ""  # digest of the dataset that it measured
    name: str = ""
    status: str = "FINISHED"
    started: int = 0  # milliseconds since 1970
    artifacts: str = ""  # where its files are


def every_finished(key: str) -> list[Done]:
    """All FINISHED runs whose step has this key, the newest first."""
    criteria = f"tags.`lsa.key` = '{quoted(key)}' and attributes.status = 'FINISHED'"
    order = ["attributes.start_time DESC"]
    return [_done(run) for run in client().search_runs(experiments(), criteria, order_by=order)]


def finished_steps(project: str) -> Iterator[Done]:
    """Every FINISHED step of a project, newest first, in any experiment."""
    everywhere = experiments()
    criteria = f"tags.project = '{quoted(project)}' and attributes.status = 'FINISHED'"
    token = None
    while True:
        page = client().search_runs(
            everywhere,
            criteria,
            max_results=1000,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        yield from (_done(run) for run in page if _is_step(run.data.tags))
        token = page.token
        if not token:
            return


def _is_step(tags: Mapping[str, str]) -> bool:
    """Whether a run has what every step of a project has; other programs may share a store."""
    return "lsa.step" in tags and whole_number(tags.get("seed", "0")) is not None


def not_finite(tags: Mapping[str, str]) -> dict[str, float]:
    """NaN or infinite results, read from tags: MLflow's charts need finite metrics."""
    return {
        k.removeprefix(NOT_FINITE): float(v)
        for k, v in tags.items()
        if k.startswith(NOT_FINITE) and v in ("nan", "inf", "-inf")
    }


def by_prefix(prefix: str) -> Done:
    """The run whose ID starts with this text, in any state.

    Raises:
        InputError: There is none, or there are several.
    """
    matching = []
    if prefix.isalnum():  # as all IDs are, and no wildcard is
        criteria = f"attributes.run_id LIKE '{prefix}%'"
        matching = client().search_runs(experiments(), criteria, max_results=10)
    if not matching:
        raise InputError(
            f"no run {prefix!r} in {shown(uri())}; give a run ID or the beginning of one, or "
            "optimizer=…"
        )
    if len(matching) > 1:
        some = ", ".join(f"{run.info.run_id[:12]}… ({run.info.run_name})" for run in matching)
        raise InputError(f"run {prefix!r} may be any of {some}; give more of its ID")
    return _done(matching[0])


def newest(count: int) -> list[Done]:
    """The steps of lsa that were begun last and have finished."""
    criteria, order = "tags.`lsa.step` != '' and attributes.status = 'FINISHED'", _LATEST
    runs = client().search_runs(experiments(), criteria, max_results=count, order_by=order)
    return [_done(run) for run in runs]


def folder(done: Done) -> Path | None:
    """Folder of a run's artifacts on this machine; None if a server or a bucket holds them."""
    path = get_local_path_or_none(done.artifacts)
    return Path(path) if path else None


def newest_on(training: str, step: str) -> Done | None:
    """The newest run of a step on the checkpoint of a training."""
    criteria, order = f"tags.`lsa.step` = '{quoted(step)}'", ["attributes.start_time DESC"]
    newest = client().search_runs(experiments(), criteria, max_results=PAGE, order_by=order)
    on_it = (done for done in map(_done, newest) if done.params.get("checkpoint") == training)
    return next(on_it, None)


def is_deleted(run_id: str | None) -> bool:
    """Whether a run was deleted, restorably or for good; False for an ID without a run."""
    if run_id is None:
        return False
    try:
        return client().get_run(run_id).info.lifecycle_stage == "deleted"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return True


def deleted_trainings() -> set[str]:
    """IDs of the trainings that were deleted and not yet removed for good."""
    everywhere = client().search_experiments(view_type=ViewType.ALL)
    criteria, token, ids = "tags.`lsa.step` = 'train'", None, set()
    while True:
        page = client().search_runs(
            [e.experiment_id for e in everywhere],
            criteria,
            run_view_type=ViewType.DELETED_ONLY,
            max_results=PAGE,
            page_token=token,
        )
        ids |= {run.info.run_id for run in page}
        token = page.token
        if not token:
            return ids


def files(run_id: str) -> list[str]:
    """Names of a run's artifacts, those in folders left out.

    Raises:
        Broken: Nothing can be read where they are.
    """
    with reading(f"the list of files of run {run_id}"):
        return [file.path for file in client().list_artifacts(run_id) if not file.is_dir]


def read(run_id: str) -> Done:
    """A run's metrics, parameters and tags."""
    return _done(client().get_run(run_id))


def _done(run: Any) -> Done:
    data, info = run.data, run.info
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return Done(
        run_id=info.run_id,
        metrics=dict(data.metrics),
        params=data.params | _resolved(data.tags),
        tags=dict(data.tags),
        seconds=((info.end_time or info.start_time) - info.start_time) / 1000,
        experiment=info.experiment_id,
        data=", ".join(dict.fromkeys(dataset_input.dataset.digest for dataset_input in inputs)),
        name=info.run_name or "",
        status=info.status,
        started=info.start_time,
        artifacts=info.artifact_uri or "",
    )


def _resolved(tags: Mapping[str, str]) -> dict[str, str]:
    """Parameters whose values `mlflow run` has logged as they were typed."""
    return {k.removeprefix(PARAM): v for k, v in tags.items() if k.startswith(PARAM)}


def artifact(run_id: str, path: str, root: str = "") -> Any:
    """A JSON artifact of a run.

    Args:
        run_id: The run.
        path: Of the artifact in it.
        root: Where the run's artifacts are, as `Done` says it: the store need not be asked then.

    Raises:
        Broken: It is not there, damaged or beyond all bounds.
        InputError: The store does not answer.
    """
    name = f"artifact {path} of run {run_id}"
    with reading(name), tempfile.TemporaryDirectory() as scratch:
        root = root or client().get_run(run_id).info.artifact_uri or ""
        local = get_local_path_or_none(root)
        if local and Path(local, path).is_file():  # else MLflow would copy it first
            file = Path(local, path)
        else:
            source = f"{root}/{path}"
            file = Path(store.insist(lambda: download_artifacts(source, dst_path=scratch)))
        try:
            return documents.read_json(file, name)
        except InputError as error:
            raise Broken(str(error)) from None


# --- left open ------------------------------------------------------------------------------------


def ended(name: str, tags: Mapping[str, str]) -> str | None:
    """The newest run of that name and tags that is not RUNNING, to be taken up again."""
    criteria = f"attributes.run_name = '{quoted(name)}' and attributes.status != 'RUNNING'"
    for key, value in tags.items():
        criteria += f" and tags.`{key}` = '{quoted(value)}'"
    order = ["attributes.start_time DESC"]
    newest = client().search_runs(experiments(), criteria, max_results=1, order_by=order)
    return newest[0].info.run_id if newest else None


def end_stale(tag: str, value: str) -> list[str]:
    """End the runs with a tag that are RUNNING although their process here has died.

    Returns:
        Their names.
    """
    gone = [run for run in running(tag, value) if provenance.gone(run.tags)]
    for run in gone:
        end_gone(run.run_id)
    return [run.name for run in gone]


def running(tag: str = "", value: str = "") -> list[Done]:
    """The runs that are RUNNING, those with a tag or all."""
    criteria = "attributes.status = 'RUNNING'"
    if tag:
        criteria += f" and tags.`{tag}` = '{quoted(value)}'"
    return [_done(run) for run in client().search_runs(experiments(), criteria)]


def end_gone(run_id: str) -> None:
    """End a run whose process is gone, and remove the checkpoints that it left half stored."""
    remove_models(run_id)
    give_up(run_id, "its process died without ending it")


def give_up(run_id: str, why: str) -> None:
    """Mark a run KILLED and note why; it is never reused."""
    client().set_tag(run_id, "lsa.error", why)
    client().set_terminated(run_id, "KILLED")


def remove_models(run_id: str, name: str = "", but: str = "") -> None:
    """Remove logged models of a run whose files never came, or that were made twice.

    Args:
        run_id: The run.
        name: Of the models; any by default.
        but: ID of the model of that name that stays, whose others go although they are whole.
    """
    for model in models_of(run_id, name):
        if model.model_id != but and (but or model.status != LoggedModelStatus.READY):
            client().delete_logged_model(model.model_id)


def models_of(run_id: str, name: str = "") -> list[Any]:
    """Logged models of a run, those of a name or all."""
    criteria = f"source_run_id = '{quoted(run_id)}'"
    criteria += f" and name = '{quoted(name)}'" if name else ""
    return list(logged_models(criteria))


def logged_models(criteria: str) -> Iterator[Any]:
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

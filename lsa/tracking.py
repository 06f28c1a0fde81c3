"""Runs in MLflow: what is logged where, and what finished before.

MLflow facts that shape this file: `mlflow run` creates the run and logs `-P` values as typed before
any of our code runs; parameters cannot be changed afterwards; `inf` is stored as 1.8e308; and a
metric logged with a `model_id` stands on that checkpoint's page as well as on the run's.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.artifacts import download_artifacts
from mlflow.entities import (
    Dataset,
    DatasetInput,
    LoggedModelInput,
    Metric,
    Param,
    RunStatus,
    RunTag,
)
from mlflow.exceptions import MlflowException

from lsa import documents, provenance, signals
from lsa.checkpoint import Checkpoint
from lsa.errors import InputError, without_passwords
from lsa.probe import Probe, Result
from lsa.store import client, experiments, quoted, shown, uri

KIND = "custom_model_development"
NOT_FINITE = "lsa.not_finite."  # + name of the metric: a tag that holds its value
_PARENT: ContextVar[str | None] = ContextVar("parent", default=None)
BATCH = 900  # metrics per request; the server takes 1000


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """An open MLflow run."""

    id: str
    attached: bool = False  # `mlflow run` created it

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters that the run does not have yet; what the user typed stays as typed."""
        present = client().get_run(self.id).data.params
        missing = [Param(k, str(v)) for k, v in values.items() if k not in present]
        client().log_batch(self.id, params=missing)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        client().log_batch(self.id, tags=[RunTag(k, str(v)) for k, v in values.items()])

    def metrics(
        self, values: Mapping[str, float], *, step: int = 0, source: Checkpoint | None = None
    ) -> None:
        """Log numbers at a step, on the checkpoint `source` too; not finite ones become tags."""
        finite = {k: float(v) for k, v in values.items() if np.isfinite(v)}
        now = int(time.time() * 1000)
        where = {"model_id": source.model_id, **_dataset_key(source)} if source else {}
        self._send([Metric(k, v, now, step, **where) for k, v in finite.items()])
        self.tags({NOT_FINITE + k: values[k] for k in values.keys() - finite.keys()})

    def curve(self, name: str, values: np.ndarray) -> None:
        """Log one metric at steps 0, 1, …; a curve and its x have equal steps, so either can be
        the axis of a chart."""
        now = int(time.time() * 1000)
        finite = [(i, float(v)) for i, v in enumerate(values) if np.isfinite(v)]
        # A millisecond per step: the UI's default axis, relative time, then shows a curve too.
        self._send([Metric(name, value, now + step, step) for step, value in finite])

    def _send(self, metrics: Sequence[Metric]) -> None:
        for i in range(0, len(metrics), BATCH):
            client().log_batch(self.id, metrics=metrics[i : i + BATCH])

    def json(self, content: Any, path: str) -> None:
        """Store a JSON artifact."""
        client().log_dict(self.id, content, path)

    def text(self, content: str, path: str) -> None:
        """Store a text artifact."""
        client().log_text(self.id, content, path)

    def arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays: `name` as `name.npy`, `file.name` with all others of its file as `.npz`."""
        packed: dict[str, dict[str, np.ndarray]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for name, values in arrays.items():
                file, _, key = name.partition(".")
                if key:
                    packed.setdefault(file, {})[key] = values
                else:
                    np.save(Path(scratch, f"{name}.npy"), values, allow_pickle=False)
            for file, together in packed.items():
                np.savez(Path(scratch, f"{file}.npz"), **together)  # pyright: ignore[reportArgumentType]
            client().log_artifacts(self.id, scratch)

    def figure(self, figure: Any, path: str) -> None:
        """Store a matplotlib figure."""
        client().log_figure(self.id, figure, path)

    def inputs(self, sources: Sequence[Checkpoint]) -> None:
        """Link the checkpoints that the run measures, and their dataset."""
        client().log_inputs(
            self.id,
            models=[LoggedModelInput(source.model_id) for source in sources if source.model_id],
            datasets=[DatasetInput(_dataset(sources[0]))],
        )


@contextlib.contextmanager
def run(
    name: str,
    *,
    experiment: str,
    tags: Mapping[str, Any],
    device: str,
    again: str | None = None,
) -> Iterator[Run]:
    """Attach to the run that `mlflow run` made, or start one; end it as what happened.

    `again` is a run to take up again instead of a new one.

    An error ends it FAILED with the message in the tag `lsa.error` (and, where it is nobody's
    input, the traceback as an artifact), a signal KILLED. Its tags are set as it is made, so that
    `end_stale` knows it however early its process dies.
    """
    client()  # the store is there
    git_tags, diff = provenance.git()
    versions = {f"lsa.version.{k}": v for k, v in provenance.versions().items()}
    found = {**versions, **git_tags, **provenance.machine(device), **tags}
    whole = {k: str(v) for k, v in found.items()}
    attached = "MLFLOW_RUN_ID" in os.environ
    if attached:
        active = mlflow.start_run()
        Run(active.info.run_id).tags({"mlflow.runName": name, **whole})
    elif again:
        active = mlflow.start_run(run_id=again)
        with contextlib.suppress(MlflowException):  # it may have ended well
            client().delete_tag(again, "lsa.error")
        Run(again).tags(whole)
    else:
        above = mlflow.active_run()
        parent = above.info.run_id if above else _PARENT.get()
        where = above.info.experiment_id if above else _experiment(experiment)
        active = mlflow.start_run(
            experiment_id=where,
            run_name=name,
            nested=above is not None,
            parent_run_id=parent,
            tags=whole,
        )
    opened = Run(active.info.run_id, attached)
    status = RunStatus.FAILED
    try:
        if diff:
            opened.text(diff, "provenance/uncommitted.diff")
        yield opened
        status = RunStatus.FINISHED
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or signals.behind(error):
            status = RunStatus.KILLED
        else:
            _note(opened, error)
        raise
    finally:
        mlflow.end_run(RunStatus.to_string(status))


def _note(opened: Run, error: BaseException) -> None:
    with contextlib.suppress(MlflowException, OSError):  # a full disk does not take this either
        opened.tags({"lsa.error": without_passwords(str(error))[:5000]})
        if not isinstance(error, (InputError, ArithmeticError)):
            opened.text(without_passwords(traceback.format_exc()), "traceback.txt")


def adopt(parent: str) -> None:
    """From here on, runs of this process are children of a run that another process holds."""
    _PARENT.set(parent)


def ended(name: str, tags: Mapping[str, str]) -> str | None:
    """The newest run of that name and tags that is not RUNNING, to be taken up again."""
    criteria = f"attributes.run_name = '{quoted(name)}' and attributes.status != 'RUNNING'"
    for key, value in tags.items():
        criteria += f" and tags.`{key}` = '{quoted(value)}'"
    order = ["attributes.start_time DESC"]
    found = client().search_runs(experiments(), criteria, max_results=1, order_by=order)
    return found[0].info.run_id if found else None


def end_stale(project: str) -> list[str]:
    """End the runs of a project that are RUNNING although their process here has died.

    Returns:
        Their names.
    """
    gone = [one for one in running(project) if provenance.gone(one.tags)]
    for one in gone:
        end_gone(one.run_id)
    return [one.name for one in gone]


def running(project: str | None = None) -> list[Done]:
    """The runs that are RUNNING, of a project or of all."""
    criteria = "attributes.status = 'RUNNING'"
    if project is not None:
        criteria += f" and tags.project = '{quoted(project)}'"
    return [_done(found) for found in client().search_runs(experiments(), criteria)]


def end_gone(run_id: str) -> None:
    """End a run whose process is gone."""
    client().set_tag(run_id, "lsa.error", "its process died without ending it")
    client().set_terminated(run_id, "KILLED")


def end_attached(status: str, message: str) -> None:
    """End the run that `mlflow run` made for this process when no step has begun in it."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        with contextlib.suppress(MlflowException):
            client().set_tag(run_id, "lsa.error", message[:5000])
            client().set_terminated(run_id, status)


def artifact(run_id: str, path: str, root: str = "") -> Any:
    """A JSON artifact of a run.

    Args:
        run_id: The run.
        path: Of the artifact in it.
        root: Where the run's artifacts are, as `Done` says it: the store need not be asked then.

    Raises:
        InputError: It is not there, damaged or beyond all bounds.
    """
    name = f"artifact {path} of run {run_id}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            root = root or client().get_run(run_id).info.artifact_uri or ""
            file = download_artifacts(f"{root}/{path}", dst_path=scratch)
            return documents.read_json(Path(file), name)
    except (MlflowException, OSError) as error:
        raise InputError(f"{name} is not there ({error}); run its step again") from None


def _experiment(name: str) -> str:
    """The experiment that `mlflow run` or the user chose, else the project's own."""
    if "MLFLOW_EXPERIMENT_ID" in os.environ:
        return os.environ["MLFLOW_EXPERIMENT_ID"]
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", name)
    found = client().get_experiment_by_name(name)
    if found and found.lifecycle_stage == "deleted":
        raise InputError(f"experiment {name!r} is deleted in {uri()}; restore or purge it")
    if found:
        return found.experiment_id
    # The kind makes the UI open on models and runs, not on its pages for language-model agents.
    return client().create_experiment(name, tags={"mlflow.experimentKind": KIND})


def _dataset(source: Checkpoint) -> Dataset:
    options = source.recipe.dataset.model_dump_json()
    key = _dataset_key(source)
    return Dataset(key["dataset_name"], key["dataset_digest"], "lsa", options)


def _dataset_key(source: Checkpoint) -> dict[str, str]:
    return {
        "dataset_name": source.recipe.dataset.name,
        "dataset_digest": source.data_hash[:36],
    }


def log_result(opened: Run, probe: Probe, result: Result, sources: Sequence[Checkpoint]) -> None:
    """Log everything in a probe's result under `probe/…`.

    The headline numbers of one checkpoint and their errors are logged on that checkpoint too: they
    are its row in the UI's table of models, which would drown in all of them. Those of a pair are
    not, since they are no property of either.
    """
    name = probe.name
    of_checkpoint: dict[str, float] = {}
    of_run: dict[str, float] = {f"{name}/converged": result.converged}
    for key, metric in result.metrics.items():
        values = of_checkpoint if key in probe.headline and not probe.pair else of_run
        values[f"{name}/{key}"] = metric.value
        for origin, error in metric.errors.items():
            values[f"{name}/{key}_se_{origin}"] = error
    opened.metrics(of_checkpoint, source=sources[0])
    opened.metrics(of_run)
    axes = {curve.x_name: curve.x for curve in result.curves.values()}
    curves = axes | {name: curve.y for name, curve in result.curves.items()}
    for key, values in curves.items():
        opened.curve(f"{name}/{key}", values)
    opened.arrays(result.arrays)
    opened.json(summary(result), f"{name}.json")
    opened.tags({f"lsa.note.{i}": note for i, note in enumerate(result.notes)})
    opened.tags({"lsa.curves": " ".join(f"{name}/{key}" for key in curves)})


def summary(result: Result) -> dict[str, Any]:
    """A result as JSON: all but its arrays."""
    return {
        "metrics": {
            name: {
                "value": plain(m.value),
                "unit": m.unit,
                "standard_errors": {source: plain(e) for source, e in m.errors.items()},
            }
            for name, m in result.metrics.items()
        },
        "curves": {
            name: {
                "x_name": c.x_name,
                "x_unit": c.x_unit,
                "y_unit": c.y_unit,
                "x": [plain(v) for v in c.x],
                "y": [plain(v) for v in c.y],
                "y_standard_error": None if c.error is None else [plain(v) for v in c.error],
            }
            for name, c in result.curves.items()
        },
        "arrays": {name: list(values.shape) for name, values in result.arrays.items()},
        "converged": result.converged,
        "notes": list(result.notes),
    }


def plain(value: float) -> float | str:
    """A JSON number, or the name of one that JSON does not have."""
    return float(value) if np.isfinite(value) else str(float(value))


# --- memory ------------------------------------------------------------------------------------


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


def finished(key: str) -> Done | None:
    """The newest FINISHED run whose step has this key, in any experiment."""
    found = client().search_runs(
        experiments(),
        f"tags.`lsa.key` = '{key}' and attributes.status = 'FINISHED'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return _done(found[0]) if found else None


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
    return "lsa.step" in tags and tags.get("seed", "0").lstrip("-").isdecimal()


def not_finite(tags: Mapping[str, str]) -> dict[str, float]:
    """Metrics that were not finite: MLflow would store another number, so they are tags."""
    return {
        k.removeprefix(NOT_FINITE): float(v) for k, v in tags.items() if k.startswith(NOT_FINITE)
    }


def whole(prefix: str) -> Done:
    """The run whose ID starts like this, whatever became of it.

    Raises:
        InputError: There is none, or there are several.
    """
    found = []
    if prefix.isalnum():  # as all IDs are, and no wildcard is
        criteria = f"attributes.run_id LIKE '{prefix}%'"
        found = client().search_runs(experiments(), criteria, max_results=10)
    if not found:
        raise InputError(
            f"no run {prefix!r} in {shown(uri())}; give a run ID or the beginning of one, or "
            "optimizer=…"
        )
    if len(found) > 1:
        some = ", ".join(f"{one.info.run_id[:12]}… ({one.info.run_name})" for one in found)
        raise InputError(f"run {prefix!r} may be any of {some}; give more of its ID")
    return _done(found[0])


def newest_on(training: str, step: str) -> Done | None:
    """The newest run of a step on the checkpoint of a training."""
    criteria = f"tags.`lsa.step` = '{quoted(step)}' and params.checkpoint = '{quoted(training)}'"
    order = ["attributes.start_time DESC"]
    found = client().search_runs(experiments(), criteria, max_results=1, order_by=order)
    return _done(found[0]) if found else None


def files(run_id: str) -> list[str]:
    """Names of a run's artifacts, those in folders left out."""
    return [file.path for file in client().list_artifacts(run_id) if not file.is_dir]


def read(run_id: str) -> Done:
    """A run's metrics, parameters and tags."""
    return _done(client().get_run(run_id))


def _done(found: Any) -> Done:
    data, info = found.data, found.info
    inputs = found.inputs.dataset_inputs if found.inputs else []
    return Done(
        run_id=info.run_id,
        metrics=dict(data.metrics),
        params=dict(data.params),
        tags=dict(data.tags),
        seconds=((info.end_time or info.start_time) - info.start_time) / 1000,
        experiment=info.experiment_id,
        data=", ".join(dict.fromkeys(one.dataset.digest for one in inputs)),
        name=info.run_name or "",
        status=info.status,
        started=info.start_time,
        artifacts=info.artifact_uri or "",
    )

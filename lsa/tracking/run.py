"""A run in MLflow while it is open: what it logs, from its spool entry into the store.

MLflow facts that shape this file:

- `mlflow run` creates the run and logs `-P` values as typed, before any of our code runs.
- Parameters cannot be changed afterwards.
- `inf` is stored as 1.8e308.
- A metric logged with a `model_id` is on that checkpoint's page as well as on the run's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from lsa.runtime.errors import InputError
from lsa.tracking import attached, headlines, runs, spool, store
from lsa.tracking.address import is_served
from lsa.tracking.checkpoint import Checkpoint
from lsa.tracking.numbers import taken
from lsa.tracking.store import client, experiments, uri

KIND = "custom_model_development"
BATCH = 900  # metrics per request; the server takes 1000
FEW = 90  # parameters or tags per request; the server takes 100
TOKEN = "lsa.entry"  # tag: names a run before the store does


class Run:
    """An open MLflow run. What it logs is written to its spool entry and sent from there."""

    def __init__(self, entry: spool.Entry) -> None:
        self.entry = entry
        self._content = entry.content
        self._asked = entry.kept  # the store may have made the run already
        self._open = False
        self.ended = False  # and the store has taken it
        self._sent_params: set[str] = set()
        self._sent_tags: dict[str, str] = {}
        self._sent_metrics = 0
        self._tried_inputs = entry.kept
        self._sent_inputs = False
        self._sent_files: set[str] = set()
        self._sent_trainings: set[str] = set()

    @property
    def id(self) -> str:
        """The run's ID; empty until the store has made the run."""
        return self._content.run_id

    # --- what it logs -----------------------------------------------------------------------------

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters. Those that `mlflow run` has logged as they were typed, such as the path
        of a project, are tags as well, in the words of this program."""
        self._content.params |= {k: str(v) for k, v in values.items()}

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._content.tags |= {k: str(v) for k, v in values.items()}

    def tag(self, name: str) -> str:
        """The value of a tag that was set; else empty."""
        return self._content.tags.get(name, "")

    def metrics(self, values: Mapping[str, float], *, step: int = 0, on: Any = None) -> None:
        """Log numbers; NaN and infinite ones become tags, since MLflow charts need finite metrics.

        Args:
            values: Name → number.
            step: Of the metrics.
            on: A checkpoint on which they are logged as well.
        """
        where = {"model_id": on.model_id, **dataset_key(on)} if on else {}
        self._content.metrics += finite(values, step, where)
        self.not_finite(values)

    def on_training(self, source: Checkpoint, values: Mapping[str, float], *, pair: bool) -> None:
        """Log numbers of a training's last checkpoint on the training's run as well.

        Then accuracy and curvature of a network are in one row of MLflow's UI.

        Args:
            source: The checkpoint.
            values: Name → number.
            pair: Whether they are of a pair. Those are logged on the checkpoint too, and the
                largest of all pairs is kept.
        """
        where = {"model_id": source.model_id, **dataset_key(source)} if pair else {}
        self._content.trainings[source.run_id] = finite(values, 0, where)  # drawn as bars

    def not_finite(self, values: Mapping[str, float]) -> None:
        """Log NaN and infinite numbers as tags, since MLflow's charts need finite metrics."""
        self.tags({taken(runs.NOT_FINITE + k): v for k, v in values.items() if not np.isfinite(v)})

    def curve(self, name: str, values: np.ndarray, steps: np.ndarray | None = None) -> None:
        """Log a metric `(n,)` at steps 0, 1, …, or at the steps given, `(n,)` whole numbers."""
        at = range(len(values)) if steps is None else map(int, steps)
        for i, value in zip(at, values, strict=True):
            # A millisecond per step: the UI's default axis, relative time, then shows it too.
            for point in finite({name: value}, i, {}):
                point["timestamp"] += i
                self._content.metrics.append(point)

    def json(self, content: Any, path: str) -> None:
        """Store a JSON artifact."""
        self.text(json.dumps(content, indent=2), path)

    def text(self, content: str, path: str) -> None:
        """Store a text artifact."""
        self.entry.file(path).write_text(content, encoding="utf-8")

    def arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays: `name` as `name.npy`, `file.name` with all others of its file as `.npz`."""
        packed: dict[str, dict[str, np.ndarray]] = {}
        for name, values in arrays.items():
            file, _, key = name.partition(".")
            if key:
                packed.setdefault(file, {})[key] = values
            else:
                np.save(self.entry.file(f"{name}.npy"), values, allow_pickle=False)
        for file, together in packed.items():
            np.savez(self.entry.file(f"{file}.npz"), **together)  # pyright: ignore[reportArgumentType]

    def picture(self, png: bytes, path: str) -> None:
        """Store a picture."""
        self.entry.file(path).write_bytes(png)

    def inputs(self, sources: Sequence[Checkpoint]) -> None:
        """Link the checkpoints that the run measures, and their dataset."""
        self._content.models = [source.model_id for source in sources if source.model_id]
        key, options = dataset_key(sources[0]), sources[0].recipe.dataset.model_dump_json()
        named = {"name": key["dataset_name"], "digest": key["dataset_digest"]}
        self._content.dataset = {**named, "source_type": "lsa", "source": options}

    # --- into the store ---------------------------------------------------------------------------

    def attempt(self, send: Callable[[Run], None] | None = None) -> None:
        """Send everything logged so far; if the store does not answer, the rest is sent later."""
        store.ask(lambda: (send or Run.send)(self), None)

    def send(self) -> None:
        """Log everything that has not been sent, and resend whatever may not have arrived."""
        if not self._open:
            self._take_up()
        content, to = self._content, client()
        if content.params.keys() - self._sent_params:
            present = to.get_run(self.id).data.params
            missing = {k: v for k, v in content.params.items() if k not in present}
            typed = {k: v for k, v in content.params.items() if present.get(k, v) != v}
            self.tags({runs.PARAM + k: v for k, v in typed.items()})
            for part in _parts([Param(k, v) for k, v in missing.items()], FEW):
                to.log_batch(self.id, params=part)
            self._sent_params = set(content.params)
        changed = {k: v for k, v in content.tags.items() if self._sent_tags.get(k) != v}
        for part in _parts([RunTag(k, v) for k, v in changed.items()], FEW):
            to.log_batch(self.id, tags=part)
        self._sent_tags |= changed
        for part in _parts(content.metrics[self._sent_metrics :], BATCH):
            to.log_batch(self.id, metrics=[Metric(**metric) for metric in part])
            self._sent_metrics += len(part)
        if content.dataset and not self._sent_inputs:
            # MLflow lists a checkpoint twice that is linked twice.
            known = to.get_run(self.id).inputs if self._tried_inputs else None
            self._tried_inputs = True
            if not (known and known.model_inputs):
                _send_inputs(self.id, content)
            self._sent_inputs = True
        for run_id, metrics in content.trainings.items():
            if run_id not in self._sent_trainings:
                headlines.put(run_id, metrics)
                self._sent_trainings.add(run_id)
        for name in self.entry.files():
            if name not in self._sent_files:
                folder = name.rpartition("/")[0]
                to.log_artifact(self.id, str(self.entry.file(name)), folder or None)
                self._sent_files.add(name)

    def _take_up(self) -> None:
        """Use the run that was made for this entry, or make a new one."""
        run = existing(self._content, self._asked)
        self._asked = True
        if run is None:
            self.entry.name_run(_create(self._content))
            self._sent_tags = dict(self._content.tags)
        else:
            self.entry.name_run(run.info.run_id)
            if run.info.status != "RUNNING":
                client().update_run(self.id, status="RUNNING")
            if "lsa.error" in run.data.tags:
                client().delete_tag(self.id, "lsa.error")
        self._open = True

    def end(self, status: str) -> None:
        """End the run, at the time when it was measured if that is known."""
        if TOKEN in self._content.tags and is_served(uri()):
            for double in _made(self._content):  # of a request whose answer was lost
                if double.info.run_id != self.id:
                    client().delete_run(double.info.run_id)
        client().set_terminated(self.id, status, self._content.ended or None)
        self.ended = True


def finite(
    values: Mapping[str, float], step: int, where: Mapping[str, str]
) -> list[spool.LoggedMetric]:
    """The finite numbers as fields of MLflow's metrics, with the current time.

    Args:
        values: Name → value.
        step: At which they are logged.
        where: Fields of a checkpoint on which they are logged too.
    """
    at: dict[str, Any] = {"timestamp": int(time.time() * 1000), "step": step, **where}
    return [
        spool.LoggedMetric(key=taken(key), value=float(value), **at)
        for key, value in values.items()
        if np.isfinite(value)
    ]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def existing(content: spool.Content, asked: bool) -> Any:
    """The run of an entry, if the store has it."""
    if content.run_id:
        try:
            run = client().get_run(content.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            return run if run.info.lifecycle_stage == "active" else None
    if not asked:
        return None
    return next(iter(_made(content)), None)


def _made(content: spool.Content) -> list[Any]:
    """The runs that the store has made for an entry."""
    return list(client().search_runs(experiments(), f"tags.`{TOKEN}` = '{content.token}'"))


def _create(content: spool.Content) -> str:
    """A new run for an entry; its ID."""
    made = client().create_run(
        content.experiment_id or _experiment(content.experiment),
        start_time=content.started,
        tags=content.tags,
        run_name=content.name,
    )
    return made.info.run_id


def _experiment(name: str) -> str:
    """The experiment that the user chose by its name, else the project's own."""
    return experiment_named(attached.experiment_name(name))


def experiment_named(name: str) -> str:
    """ID of the experiment with a name; made if there is none.

    Raises:
        InputError: It is deleted.
    """
    experiment = client().get_experiment_by_name(name)
    if experiment and experiment.lifecycle_stage == "deleted":
        raise InputError(f"experiment {name!r} is deleted in {uri()}; restore or purge it")
    if experiment:
        return experiment.experiment_id
    try:
        # The kind makes the UI open on models and runs, not on its pages for language agents.
        return client().create_experiment(name, tags={"mlflow.experimentKind": KIND})
    except MlflowException:
        if made := client().get_experiment_by_name(name):  # by another client, just now
            return made.experiment_id
        raise


def dataset_key(source: Checkpoint) -> dict[str, str]:
    """Name and digest of a checkpoint's dataset, as metrics on it carry them."""
    return {
        "dataset_name": source.recipe.dataset.name,
        "dataset_digest": source.data_hash[:36],
    }


def _send_inputs(run_id: str, content: spool.Content) -> None:
    """The dataset and the checkpoints that a run measures."""
    dataset = DatasetInput(Dataset(**content.dataset))  # pyright: ignore[reportArgumentType]
    models = [LoggedModelInput(model_id) for model_id in content.models]
    try:
        client().log_inputs(run_id, [dataset], models=models)
    except MlflowException as error:
        # MLflow looks whether a dataset is known and then adds it: two that do so at once collide.
        if not store.sent_twice(error):
            raise
        client().log_inputs(run_id, [dataset], models=models)

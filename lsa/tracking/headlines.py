"""Headline numbers of probes on the run of the training whose last checkpoint they measured.

The UI compares what lies in one run: accuracy, curvature and barriers of a network stand together
there, under the names that they have on the probes' own runs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from lsa.tracking import store
from lsa.tracking.runs import Done
from lsa.tracking.spool import LoggedMetric
from lsa.tracking.store import client

log = logging.getLogger(__name__)
PARTS = ("_se_", "_residual")  # what follows a number's name in those of its errors


def put(run_id: str, metrics: Sequence[LoggedMetric]) -> None:
    """Log numbers on a training's run; of pairs, which name their model, what is worse than known.

    A training that is deleted has none.
    """

    def send() -> None:
        pair = any("model_id" in metric for metric in metrics)
        known = client().get_run(run_id).data.metrics if pair else {}
        if sent := worse(metrics, known) if pair else metrics:
            client().log_batch(run_id, metrics=[Metric(**metric) for metric in sent])

    unless_deleted(run_id, send)


def unless_deleted(run_id: str, write: Callable[[], object]) -> None:
    """Write something that belongs to a training's run, which somebody may have deleted."""
    try:
        write()
    except MlflowException as error:
        if store.away(error):
            raise
        log.info("run %s takes no more: %s", run_id, error)


def worse(metrics: Sequence[LoggedMetric], known: Mapping[str, float]) -> list[LoggedMetric]:
    """Numbers of a pair that exceed those logged so far, with their errors."""
    higher = {
        metric["key"]
        for metric in metrics
        if not any(part in metric["key"] for part in PARTS)
        and not metric["value"] <= known.get(metric["key"], float("-inf"))
    }
    return [metric for metric in metrics if _number(metric["key"]) in higher]


def _number(name: str) -> str:
    """The number that a metric is, or is the error of."""
    for part in PARTS:
        name = name.partition(part)[0]
    return name


def bring_up(training: Done, wanted: Mapping[str, float]) -> None:
    """Log those numbers that a training's run does not have, on it and on its checkpoint."""
    model = training.tags.get("lsa.model_id") or None
    now = int(time.time() * 1000)
    lacking = [
        Metric(name, value, now, 0, model_id=model)
        for name, value in wanted.items()
        if math.isfinite(value) and training.metrics.get(name) != value
    ]
    if lacking:
        unless_deleted(
            training.run_id, lambda: client().log_batch(training.run_id, metrics=lacking)
        )

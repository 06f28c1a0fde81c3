"""The values that many runs logged for one metric: in a question for many, not one for each.

MLflow's client gives one run's history at a time. Its stores and its server, for the charts of its
UI, give many; where one does not, the client is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow.utils.rest_utils import http_request

from lsa.runtime import signals
from lsa.tracking import store

RUNS, ROWS = 100, 25_000  # that MLflow's server takes and gives at once
ENDPOINT = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
Row = tuple[str, int, float]  # run, step, value


def metric_histories(run_ids: Sequence[str], metric: str) -> dict[str, dict[int, float]]:
    """Run → step → value, the last that was logged at the step."""
    histories: dict[str, dict[int, float]] = {run_id: {} for run_id in run_ids}
    for i in range(0, len(run_ids), RUNS):
        for run_id, step, value in _rows(run_ids[i : i + RUNS], metric):
            histories[run_id][step] = value
    return histories


def _rows(run_ids: Sequence[str], metric: str) -> Iterator[Row]:
    """In the order of time for each run."""
    rows = _together(run_ids, metric)
    if rows is None or (len(rows) >= ROWS and len(run_ids) == 1):
        yield from _one_by_one(run_ids, metric)
    elif len(rows) >= ROWS:  # there are more
        half = len(run_ids) // 2
        yield from _rows(run_ids[:half], metric)
        yield from _rows(run_ids[half:], metric)
    else:
        yield from rows


def _together(run_ids: Sequence[str], metric: str) -> list[Row] | None:
    """The first `ROWS`; None where the store has no such question."""
    behind: Any = store.client()._tracking_client.store
    if hasattr(behind, "get_metric_history_bulk"):
        with signals.held():
            points = behind.get_metric_history_bulk(list(run_ids), metric, ROWS)
        return [_row(point.to_dict()) for point in points]
    if not hasattr(behind, "get_host_creds"):
        return None
    asked = [("metric_key", metric), *(("run_id", run_id) for run_id in run_ids)]
    answer: Any = http_request(
        behind.get_host_creds(), ENDPOINT, "GET", params=asked, raise_on_status=False
    )
    if answer.status_code != 200:
        return None
    return [_row(point) for point in answer.json()["metrics"]]


def _row(point: Mapping[str, Any]) -> Row:
    return point["run_id"], int(point["step"]), float(point["value"])


def _one_by_one(run_ids: Sequence[str], metric: str) -> Iterator[Row]:
    client = store.client()
    with ThreadPoolExecutor(store.AT_ONCE) as pool:
        histories = pool.map(lambda run_id: client.get_metric_history(run_id, metric), run_ids)
    for run_id, history in zip(run_ids, histories, strict=True):
        yield from ((run_id, point.step, point.value) for point in sorted(history, key=_when))


def _when(point: Any) -> tuple[int, int]:
    return point.timestamp, point.step

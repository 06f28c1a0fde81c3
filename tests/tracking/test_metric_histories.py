"""Histories of many runs against MLflow's client, which gives one at a time."""

from __future__ import annotations

import math

import pytest
from mlflow.entities import Metric

from lsa.tracking import metric_histories, store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


@pytest.fixture
def runs(workplace) -> list[str]:
    """Three runs: with five values of "a", two of them at one step; with seven; with none."""
    client = store.client()
    ids = [client.create_run("0").info.run_id for _ in range(3)]
    for run_id, count in zip(ids, (5, 7, 0), strict=True):
        values = [Metric("a", i / 8, 1000 + i, max(i, 1)) for i in range(count)]
        client.log_batch(run_id, [*values, Metric("b", 9.0, 1, 0)])
    return ids


def as_the_client_says(run_ids: list[str], metric: str) -> dict[str, dict[int, float]]:
    client = store.client()
    return {i: {m.step: m.value for m in client.get_metric_history(i, metric)} for i in run_ids}


@pytest.mark.parametrize("rows", [100, 6, 3])  # all at once; one run at once; one at a time
@pytest.mark.parametrize("together", [2, 100])
def test_every_run_has_its_own_values(runs, monkeypatch, rows, together):
    expected = as_the_client_says(runs, "a")
    assert [len(history) for history in expected.values()] == [4, 6, 0]
    assert expected[runs[0]][1] == 1 / 8, "the later of the two"
    monkeypatch.setattr(metric_histories, "ROWS", rows)
    monkeypatch.setattr(metric_histories, "RUNS", together)
    assert metric_histories.metric_histories(runs, "a") == expected


def test_a_store_that_gives_one_history_at_a_time_is_asked_for_each(runs, monkeypatch):
    expected = as_the_client_says(runs, "a")
    monkeypatch.setattr(metric_histories, "_together", lambda *_: None)
    assert metric_histories.metric_histories(runs, "a") == expected


def test_no_runs_and_a_value_that_is_no_number(runs):
    assert metric_histories.metric_histories([], "a") == {}
    store.client().log_metric(runs[2], "a", math.nan, step=3)
    (history,) = metric_histories.metric_histories(runs[2:], "a").values()
    assert list(history) == [3] and math.isnan(history[3])

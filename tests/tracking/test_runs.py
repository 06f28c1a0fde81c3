"""Runs read back."""

from __future__ import annotations

import math

import pytest
from mlflow.entities import Metric

from lsa.tracking import runs, store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def test_a_history_has_the_last_value_of_every_step(workplace):
    run_id = store.client().create_run("0").info.run_id
    points = [(0.5, 1000, 1), (0.25, 1002, 1), (0.75, 1001, 1), (math.nan, 1000, 2)]
    store.client().log_batch(run_id, [Metric("a", value, at, step) for value, at, step in points])
    history = runs.history(run_id, "a")
    assert history[1] == 0.25 and math.isnan(history[2]) and len(history) == 2
    assert runs.history(run_id, "b") == {}

"""The literal `mlflow run` commands, as real processes against a real store."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MLFLOW = Path(sys.executable).with_name("mlflow")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The README's environment: the virtual environment first on PATH, an own store, no conda."""
    store = tmp_path_factory.mktemp("store")
    path = f"{MLFLOW.parent}:{os.environ['PATH']}"
    dropped = ("MLFLOW_CONDA_HOME", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {"PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}


def statuses(environment: dict[str, str]) -> dict[str, str]:
    """Run name → status; nothing while MLflow has not made the store."""
    database = environment["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return dict(connection.execute("select name, status from runs order by start_time"))
    except sqlite3.OperationalError:
        return {}


def mlflow_run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [str(MLFLOW), "run", ".", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_train_then_lanczos_by_optimizer_and_by_run_id(environment):
    trained = mlflow_run(environment, "-e", "train", "-P", "optimizer=sgd", "-P", "epochs=1")
    assert trained.returncode == 0, trained.stderr
    assert "no conda here; using the current Python" in trained.stderr
    run_id = re.search(r"^run +(\w+)$", trained.stdout, re.MULTILINE)
    assert run_id is not None
    options = ["-P", "k=1", "-P", "samples=64", "-P", "tol=1e-2"]
    by_name = mlflow_run(environment, "-e", "lanczos", "-P", "optimizer=sgd", *options)
    assert by_name.returncode == 0, by_name.stderr
    by_id = mlflow_run(
        environment, "-e", "lanczos", "-P", f"checkpoint={run_id[1]}", *options,
        "--env-manager", "local",
    )  # fmt: skip
    assert by_id.returncode == 0, by_id.stderr
    assert set(statuses(environment).values()) == {"FINISHED"}
    number = r"lanczos/lambda_max +(\S+)"
    assert re.search(number, by_name.stdout)[1] == re.search(number, by_id.stdout)[1]


def test_bad_input_ends_the_run_failed(environment):
    done = mlflow_run(environment, "-e", "train", "-P", "optimizer=sgd", "-P", "lr=abc")
    assert done.returncode != 0
    assert "given: 'abc'" in done.stderr and "Traceback" not in done.stderr
    assert "RUNNING" not in statuses(environment).values()

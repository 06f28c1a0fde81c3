"""The literal `mlflow run` commands, as real processes against a real store."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from processes import forked

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


def test_lanczos_of_a_training_is_that_of_the_command(environment):
    trained = forked("train", "--optimizer", "sgd", "--epochs", "1", cwd=ROOT, env=environment)
    options = ["-P", "k=1", "-P", "samples=64", "-P", "tol=1e-2"]
    done = mlflow_run(environment, "-e", "lanczos", "-P", "optimizer=sgd", *options)
    assert done.returncode == 0, done.stderr
    assert "no conda here; using the current Python" in done.stderr
    words = ["--checkpoint", run_of(trained), "--k", "1", "--samples", "64", "--tol", "1e-2"]
    command = forked("lanczos", *words, cwd=ROOT, env=environment)
    assert top(done) == top(command)
    assert set(statuses(environment).values()) == {"FINISHED"}


def run_of(trained: subprocess.CompletedProcess) -> str:
    found = re.search(r"^run +(\w+)$", trained.stdout, re.MULTILINE)
    assert trained.returncode == 0 and found is not None, trained.stderr
    return found[1]


def top(measured: subprocess.CompletedProcess) -> str:
    """λ_max as it is printed."""
    found = re.search(r"lanczos/lambda_max +(\S+)", measured.stdout)
    assert measured.returncode == 0 and found is not None, measured.stderr
    return found[1]


@pytest.mark.full
def test_train_then_lanczos_by_optimizer_and_by_run_id(environment):
    trained = mlflow_run(environment, "-e", "train", "-P", "optimizer=sgd", "-P", "epochs=1")
    options = ["-P", "k=1", "-P", "samples=64", "-P", "tol=1e-2"]
    by_name = mlflow_run(environment, "-e", "lanczos", "-P", "optimizer=sgd", *options)
    by_id = mlflow_run(
        environment, "-e", "lanczos", "-P", f"checkpoint={run_of(trained)}", *options,
        "--env-manager", "local",
    )  # fmt: skip
    assert top(by_name) == top(by_id)
    assert set(statuses(environment).values()) == {"FINISHED"}


@pytest.mark.full
def test_bad_input_ends_the_run_failed(environment):
    done = mlflow_run(environment, "-e", "train", "-P", "optimizer=sgd", "-P", "lr=abc")
    assert done.returncode != 0
    assert "given: 'abc'" in done.stderr and "Traceback" not in done.stderr
    assert "RUNNING" not in statuses(environment).values()

"""Fixtures: an empty folder with its own MLflow store, and a project that trains at once."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import order
import pytest
import torch

PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: 2, batch_size: 50}
optimizers:
  sgd: {name: SGD, lr: 0.1}
  adamw: {name: AdamW, lr: 0.01}
seeds: [0]
landscape: {samples: 64}
probes: {lanczos: {k: 2}}
"""
# Columns of MLflow's database that hold paths of files.
PATHS = [
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
]


gc.disable()  # until all tests are collected: the search for garbage took a third of that time


def pytest_collection_finish() -> None:
    """Search for garbage from here on, but not among modules and tests, which all stay."""
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, each begins with those that take long."""
    parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if parts > 1:
        items[:] = order.dealt(
            items,
            parts,
            module=lambda item: item.path,
            slow=lambda item: item.get_closest_marker("slow") is not None,
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once: a run that is stopped by a time limit prints no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        reason = report.longreprtext.strip().splitlines()[-1:]
        print("\nFAILED", report.nodeid, report.when, *reason, file=sys.__stderr__, flush=True)


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """SIGINT as on a terminal, also where a shell started the tests in the background, deaf to it.

    Processes that the tests start inherit it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def global_rng_untouched():
    """The global random state is the caller's: a test fails when lsa changes it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global torch RNG was used"


@pytest.fixture
def double():
    """Networks and data in float64, from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which nothing is yet: to make one takes MLflow two seconds, to copy it none."""
    from lsa.tracking import store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.create(path)
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Path) -> Path:
    """A folder with a tiny project and its own store, as the current folder."""
    furnish(tmp_path, monkeypatch, new_store)
    return tmp_path


def furnish(folder: Path, monkeypatch: pytest.MonkeyPatch, new_store: Path) -> None:
    """Make a folder the `workplace`."""
    import mlflow

    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    (folder / "projects").mkdir()
    (folder / "projects" / "tiny.yaml").write_text(PROJECT)
    shutil.copy(new_store, folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, new_store: Path) -> Callable[..., tuple]:
    """Calls a function with a workplace of its own; gives that folder and the result."""

    def make(function: Callable[[Path], Any]) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("once")
        with pytest.MonkeyPatch.context() as monkeypatch:
            furnish(folder, monkeypatch, new_store)
            return folder, function(folder)

    return make


@pytest.fixture(scope="session")
def trained_once(made_once):
    """A workplace in which sgd has been trained, and that training."""
    from lsa import project
    from lsa.studies import train

    return made_once(lambda _: train.train(project.load("tiny").recipe("sgd")))


@pytest.fixture
def trained(workplace: Path, trained_once):
    """The finished training of sgd in the tiny project."""
    source, done = trained_once
    copy_store(source, workplace)
    return done


def copy_store(source: Path, target: Path) -> None:
    """Copy a workplace; MLflow keeps the absolute paths of its files, which follow."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    with contextlib.closing(sqlite3.connect(target / "mlflow.db")) as database, database:
        for table, column in PATHS:
            database.execute(
                f"update {table} set {column} = replace({column}, ?, ?)", (str(source), str(target))
            )

"""lsa leaves MLflow's variables, loggers and all else of the caller's process as they were."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from lsa.tracking import settings

# MLflow is imported before, since it sets loggers of its own.
IMPORTS = """
import importlib, json, logging, os, signal, sys, warnings
import mlflow, torch

def state():
    loggers = {name: logging.getLogger(name) for name in
               ("root", "alembic", "mlflow", "mlflow.store.db.utils", "mlflow.tracking",
                "sqlalchemy.engine", "urllib3", "urllib3.connectionpool")}
    return {
        "variables": dict(os.environ),
        "loggers": {name: [one.level, len(one.handlers), len(one.filters), one.propagate]
                    for name, one in loggers.items()},
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads()],
        "hook": sys.excepthook is sys.__excepthook__,
    }

before = state()
import lsa
for name in lsa.__all__:
    getattr(lsa, name)
importlib.import_module("lsa.cli.app")
importlib.import_module("lsa.reports.report")
after = state()
print(json.dumps({k: [before[k], after[k]] for k in before if before[k] != after[k]}))
"""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch):
    """A process in which no store has been used."""
    settings._take_back()
    for name in settings.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in settings.LEVELS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    yield
    settings._take_back()


def now() -> tuple[dict[str, str], list[int]]:
    """The caller's variables and levels."""
    return dict(os.environ), [logging.getLogger(name).level for name in settings.LEVELS]


def test_an_import_of_lsa_changes_nothing_of_the_process():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_a_measurement_gives_the_callers_settings_back(unset, trained, monkeypatch):
    from lsa import load, measure
    from lsa.tracking import store

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    before, seen = now(), {}
    prepared = store._prepare

    def prepare(uri: str) -> None:
        seen.update(os.environ)
        prepared(uri)

    monkeypatch.setattr(store, "_prepare", prepare)
    source = load(optimizer="sgd", project="tiny")
    assert now() == before
    measure("lanczos", source, k=1, density_steps=5)
    assert now() == before
    assert seen["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
    assert seen["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"  # the caller's own


def test_a_study_gives_the_callers_settings_back(unset, trained):
    from lsa import step, study

    before = now()
    with study("tiny"):
        assert step("train", optimizer="sgd")["val_loss"].value > 0
    assert now() == before


def test_of_two_calls_the_last_one_gives_them_back(unset):
    before, inside = now(), threading.Event()
    leave = threading.Event()

    def other() -> None:
        with settings.restored():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with settings.restored():
        thread.start()
        assert inside.wait(60)
        settings.apply()
        used = now()
    assert now() == used != before
    leave.set()
    thread.join()
    assert now() == before


def test_what_the_caller_sets_meanwhile_stays(unset, monkeypatch):
    with settings.restored():
        settings.apply()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "9")
        logging.getLogger("alembic").setLevel(logging.DEBUG)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "9"
    assert logging.getLogger("alembic").level == logging.DEBUG


def test_in_a_process_of_its_own_they_stay(unset):
    settings.apply()
    used = now()
    with settings.restored():
        settings.apply()
    assert now() == used
    assert used[0]["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"

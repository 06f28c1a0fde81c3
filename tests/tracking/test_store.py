"""The store itself."""

from __future__ import annotations

import logging
import signal
import sqlite3

import mlflow
import pytest
from processes import forked

from lsa.runtime.errors import InputError
from lsa.tracking import store

KILLED_AT_WORK = """
import os, signal, sys
import mlflow.store.db.utils
from lsa.tracking import store
mlflow.store.db.utils._upgrade_db = lambda _: os.kill(os.getpid(), signal.SIGKILL)
mlflow.set_tracking_uri(sys.argv[1])
store.client()
"""


@pytest.mark.slow
def test_a_new_store_is_there_only_when_it_is_whole(tmp_path, monkeypatch):
    """MLflow by itself leaves half-made tables, which it can neither open nor finish."""
    uri = f"sqlite:///{tmp_path}/new.db"
    killed = forked(uri, code=KILLED_AT_WORK)
    assert killed.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == [".new.db.new"]
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    store.client()
    assert [file.name for file in tmp_path.iterdir()] == ["new.db"]
    assert [e.name for e in mlflow.MlflowClient(uri).search_experiments()] == ["Default"]


def test_a_store_where_nothing_can_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"sqlite:///{tmp_path}/file/new.db")
    with pytest.raises(InputError, match=r"cannot make the store .*/file/new\.db: Not a directory"):
        store.client()


def test_a_registry_of_its_own_is_made_whole_as_well(workplace):
    """Two workers that were the first to open it made its tables at once."""
    tracking, registry = store.addresses()[0], f"sqlite:///{workplace}/models.db"
    store.use(tracking, registry)
    store.client()
    with sqlite3.connect(workplace / "models.db") as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master")}
    assert {"registered_models", "evaluation_datasets"} <= tables
    assert store.client().search_registered_models() == []
    assert not (workplace / ".models.db.new").exists()


def test_the_users_mlflow_logger_is_as_mlflow_made_it():
    assert logging.getLogger("mlflow").level == logging.INFO

"""Metrics sent in the background: into whose run, and that none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from lsa.tracking import spool, store, stream, sync

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
GONE = (
    "API request to http://host failed with exception Max retries: [Errno 111] Connection refused"
)


def logged(run_id: str, name: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id, name)
    return [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)]


class Away:
    """A store that answers only when it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there, self.calls = False, 0
        real = stream.client

        def client() -> mlflow.MlflowClient:
            self.calls += 1
            if not self.there:
                raise MlflowException(GONE)
            return real()

        monkeypatch.setattr(stream, "client", client)
        monkeypatch.setattr(store, "PAUSE", 0.0)


def test_the_callers_run_takes_them_and_goes_on(workplace: Path):
    with mlflow.start_run() as run:
        mlflow.log_metric("loss", 1.0)
        opened = stream.Stream("watch")
        for step in range(1, 2001):
            opened.put({"watch/a": step / 2, "watch/b": float("nan")}, step)
        opened.file("watch/history.csv").write_text("step\n")
        opened.close()
        assert mlflow.active_run() is not None
        mlflow.log_metric("loss", 2.0)
        client = mlflow.MlflowClient()
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
        assert logged(run.info.run_id, "watch/a") == [(i, i / 2) for i in range(1, 2001)]
        assert logged(run.info.run_id, "watch/b") == []
        assert [f.path for f in client.list_artifacts(run.info.run_id, "watch")]
    assert not [*spool.folder().glob("*")]


def test_a_run_is_made_only_where_there_is_none(workplace: Path):
    opened = stream.Stream("watch")
    opened.put({"watch/a": 3.0}, 5)
    opened.close("FAILED")
    (run,) = mlflow.MlflowClient().search_runs(store.experiments())
    assert (run.info.status, run.info.run_name) == ("FAILED", "watch")
    assert logged(run.info.run_id, "watch/a") == [(5, 3.0)]


def test_a_run_that_was_made_twice_is_one(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """MLflow sends a request again whose answer was lost, and the first one had made a run."""
    make = mlflow.MlflowClient.create_run
    monkeypatch.setattr(
        mlflow.MlflowClient,
        "create_run",
        lambda *of, **more: (make(*of, **more), make(*of, **more))[1],
    )
    opened = stream.Stream("watch")
    opened.put({"watch/a": 3.0}, 5)
    opened.close()
    (run,) = mlflow.MlflowClient().search_runs(store.experiments())
    assert run.info.run_id == opened.run_id and run.info.status == "FINISHED"
    assert logged(run.info.run_id, "watch/a") == [(5, 3.0)]


def test_numbers_go_out_while_the_training_goes_on(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "PAUSE", 0.05)
    with mlflow.start_run() as run:
        opened = stream.Stream("watch")
        opened.put({"watch/a": 1.0}, 1)
        deadline = time.monotonic() + 60
        while not logged(run.info.run_id, "watch/a"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        opened.put({"watch/a": 2.0}, 2)
        opened.close()
    assert logged(run.info.run_id, "watch/a") == [(1, 1.0), (2, 2.0)]


def test_nothing_is_lost_when_the_store_is_away(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(stream, "PAUSE", 0.02)
    away = Away(monkeypatch)
    opened = stream.Stream("watch")
    for step in range(30):
        began = time.perf_counter()
        opened.put({"watch/a": float(step)}, step)
        assert time.perf_counter() - began < 1
    opened.file("watch/history.csv").write_text("step\n")
    while not away.calls:
        time.sleep(0.01)
    opened.close()
    (line,) = [r.message for r in caplog.records if "lsa sync" in r.message]
    assert "does not answer" in line and "\n" not in line
    assert next(said for _, said in sync.sync()).startswith("stays: the store")
    away.there = True
    ((_, said),) = sync.sync()
    run_id = said.removeprefix("run ")
    assert logged(run_id, "watch/a") == [(i, float(i)) for i in range(30)]
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert [*sync.sync()] == []


def test_what_was_sent_without_an_answer_is_there_once(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    """A request is done, its answer is lost, and it is made again."""
    with mlflow.start_run() as run:
        opened = stream.Stream("watch")
        opened.put({"watch/a": 1.0, "watch/b": 2.0}, 1)
        done = threading.Event()
        real = stream.send

        def cut(path, about):
            real(path, about)
            if not done.is_set():
                (path / stream.SENT).unlink(missing_ok=True)
                done.set()

        monkeypatch.setattr(stream, "send", cut)
        monkeypatch.setattr(stream, "PAUSE", 0.02)
        assert done.wait(60)
        opened.put({"watch/a": 3.0}, 2)
        opened.close()
    assert logged(run.info.run_id, "watch/a") == [(1, 1.0), (2, 3.0)]
    assert logged(run.info.run_id, "watch/b") == [(1, 2.0)]


def test_a_process_that_is_killed_leaves_all_that_was_put(workplace: Path):
    code = """
import time
from lsa.tracking import stream
stream.PAUSE = 1000
opened = stream.Stream("watch")
for step in range(10):
    opened.put({"watch/a": float(step)}, step)
print("ready", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert [*sync.sync()] == []  # its process still works on it
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    ((_, said),) = sync.sync()
    run_id = said.removeprefix("run ")
    assert logged(run_id, "watch/a") == [(i, float(i)) for i in range(10)]
    assert mlflow.MlflowClient().get_run(run_id).info.status == "KILLED"


def test_a_damaged_stream_and_one_for_another_store_stay(workplace: Path):
    for name, about in (("a", "{"), ("b", json.dumps({"store": "http://elsewhere:1"}))):
        folder = spool.folder() / f"watch-{name}{spool.STREAM}"
        folder.mkdir(parents=True)
        (folder / stream.ABOUT).write_text(about)
    said = [text for _, text in sync.sync()]
    assert said[0].startswith("stays: it is damaged")
    assert said[1] == "stays: it is for the store http://elsewhere:1"

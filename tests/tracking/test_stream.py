"""Metrics sent in the background: into whose run, and that none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name

from lsa.cli import examination
from lsa.tracking import numbers, spool, store, stream, sync

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
        self.answers = threading.Event()  # also that it is away
        self.answers.set()
        real = stream.client

        def client() -> mlflow.MlflowClient:
            self.calls += 1
            self.answers.wait()
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
    away.answers.clear()
    for step in range(30):  # put waits for no answer, or it would wait for ever
        opened.put({"watch/a": float(step)}, step)
    away.answers.set()
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


def test_sending_is_rarer_where_it_would_take_more_than_its_share(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "PAUSE", 1e3)
    opened = stream.Stream("watch", share=1e-5)
    assert opened._pause() == stream.PAUSE  # nothing is known yet
    for step in range(3):
        opened.put({"watch/a": 1.0, "watch/b": 2.0}, step)
        opened._send()
        assert (opened.price > 0) == (step > 0)  # the first one makes the run
    assert opened._pause() == max(stream.PAUSE, opened._least / 1e-5)
    assert 0 < opened._least <= opened.seconds
    opened.close()


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


def change(**fields: object) -> Callable[[Path], object]:
    def changed(path: Path) -> None:
        about = json.loads((path / stream.ABOUT).read_text())
        (path / stream.ABOUT).write_text(json.dumps(about | fields))

    return changed


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


LINE = b'["watch/a", 1.0, 1000, 1]\n'
# What happens to a stream's folder → whether all that the others need is still there.
DAMAGES = {
    "about cut": (write(stream.ABOUT, b"{"), False),
    "about no text": (write(stream.ABOUT, b"\xff\xfe"), False),
    "about a list": (write(stream.ABOUT, b"[]"), False),
    "about nested": (write(stream.ABOUT, b"[" * 100_000), False),
    "no store": (change(store=None), False),
    "a junk line": (write(stream.JOURNAL, b"junk\n" + LINE), False),
    "a short line": (write(stream.JOURNAL, b"[1, 2]\n" + LINE), False),
    "no text": (write(stream.JOURNAL, b"\x00\xff\n"), False),
    "the last line cut": (lambda path: (path / stream.JOURNAL).open("ab").write(b'["wat'), True),
    "junk for what is sent": (write(stream.SENT, b"x"), True),
    "more sent than there is": (write(stream.SENT, b"999999"), True),
    "less than nothing sent": (write(stream.SENT, b"-5"), True),
}


@pytest.mark.parametrize(("damage", "whole"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_stream_is_set_aside_and_the_others_delivered(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, damage, whole, caplog
):
    away = Away(monkeypatch)
    for name in ("damaged", "other"):
        opened = stream.Stream(name)
        opened.put({"watch/a": 1.0}, 1)
        opened.close()
    away.there = True
    damage(next(spool.folder().glob("damaged*")))
    (checked,) = [one for one in examination.examine() if one.what == "spool"]
    assert checked.state == "warning" and checked.found.startswith("2 results in")
    (_, said), (_, other) = sync.sync()
    assert logged(other.removeprefix("run "), "watch/a") == [(1, 1.0)]
    if whole:
        assert logged(said.removeprefix("run "), "watch/a") == [(1, 1.0)]
        return
    assert said.startswith("stays: it is kept in .lsa/spool/damaged/damaged-") and "since" in said
    assert list(sync.sync()) == []
    (checked,) = [one for one in examination.examine() if one.what == "spool"]
    assert "1 damaged entries are kept in .lsa/spool/damaged" in checked.found


def test_a_stream_for_another_store_stays(workplace: Path):
    folder = spool.folder() / f"watch{spool.STREAM}"
    folder.mkdir(parents=True)
    (folder / stream.ABOUT).write_text(json.dumps({"store": "http://elsewhere:1"}))
    ((_, said),) = sync.sync()
    assert said == "stays: it is for the store http://elsewhere:1"


NAMES = [
    "a@b",
    "λ_1",
    "a b:c",
    "x" * 300,
    "a/b",
    "a/..",
    "a//b",
    "/a",
    "a\nb",
    "50%",
    "é" * 251,
    "",
]


def test_a_name_that_mlflow_refuses_keeps_no_number_back(workplace: Path):
    """A network's own names stand in names of metrics: those of a ModuleDict may be any text."""
    opened = stream.Stream("watch")
    for i, name in enumerate(NAMES):
        opened.put({f"watch/{name}": float(i)}, 1)
    opened.put({"watch/last": 3.0}, 1)
    opened.close()
    (run,) = mlflow.MlflowClient().search_runs(store.experiments())
    assert run.info.status == "FINISHED" and run.data.metrics["watch/last"] == 3.0
    assert sorted(run.data.metrics.values()) == sorted([*map(float, range(len(NAMES))), 3.0])
    for name in ("λ_1", "a b:c", "a/b"):  # as they are
        assert f"watch/{name}" in run.data.metrics


def test_each_name_is_taken_once_and_no_more_changed_than_must_be():
    changed = [numbers.taken(name) for name in NAMES]
    for name, taken in zip(NAMES, changed, strict=True):
        _validate_metric_name(taken)  # MLflow's own rule
        assert len(taken) <= 250 and numbers.taken(taken) == taken
        try:
            _validate_metric_name(name)
        except MlflowException:
            assert taken != name
        else:
            assert taken == name or not name or len(name) > 250
    assert len(set(changed)) == len(NAMES)


def test_a_process_that_goes_to_another_folder_delivers(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    (workplace / "elsewhere").mkdir()
    with mlflow.start_run() as run:
        made = stream.Stream("watch")
        made.put({"a": 1.0}, 1)
        monkeypatch.chdir(workplace / "elsewhere")
        made.put({"a": 2.0}, 2)
        made.close()
    assert logged(run.info.run_id, "a") == [(1, 1.0), (2, 2.0)]
    assert not made.path.exists()


def test_a_process_that_is_forked_off_sends_nothing(workplace: Path):
    """It has no thread that sends; its end, or that of a block, is not the training's."""
    with mlflow.start_run() as run:
        made = stream.Stream("watch")
        made.put({"a": 1.0}, 1)
        child = os.fork()
        if not child:
            made.put({"a": 7.0}, 2)
            began = time.monotonic()
            made.close()
            os._exit(time.monotonic() - began > 1)
        assert os.waitpid(child, 0)[1] == 0
        made.put({"a": 2.0}, 2)
        made.close()
    assert logged(run.info.run_id, "a") == [(1, 1.0), (2, 2.0)]

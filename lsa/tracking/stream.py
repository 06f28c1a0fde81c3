"""Metrics on their way into a run while it goes on, sent by a thread of their own.

What is put into a stream is on this disk before anything is sent: a journal in the spool, with a
line for each number. The thread sends what the store does not have yet. MLflow takes the same
number only once, so what may have arrived is sent again. A stream that was not delivered to its
end, because the process died or the store was away, is delivered by `lsa sync`.

The run is the caller's active one, which is never ended here; where there is none, one is made.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from lsa.runtime import files, variables
from lsa.runtime.errors import InputError, one_line
from lsa.tracking import address, attached, spool, store
from lsa.tracking.numbers import taken
from lsa.tracking.run import BATCH, TOKEN

log = logging.getLogger(__name__)
ABOUT, JOURNAL, SENT, FILES = "about.json", "journal.jsonl", "sent", "files"
PAUSE = 2.0  # seconds between two sendings
LAST = 20.0  # seconds that a closing stream waits for its thread
FAILED = (MlflowException, OSError)  # what keeps a store from taking something


class Stream:
    """Metrics and files for one run.

    Args:
        name: Of the run that is made where the caller has none.
        run_id: Of the run; empty: the caller's active one.
        share: Of the time, that sending may take by itself, however few numbers there are; it is
            then done less often. None: no limit.

    Attributes:
        seconds: CPU time that the thread has taken.
        price: The same for one number, as of the last sending; 0 as long as it is not known.

    Raises:
        InputError: The spool cannot be written to.
    """

    def __init__(self, name: str, run_id: str = "", share: float | None = None) -> None:
        active = None if run_id else mlflow.active_run()
        token = uuid.uuid4().hex
        given = active.info.run_id if active else run_id or attached.enclosing()
        self._about: dict[str, Any] = {
            "store": address.shown(store.uri()),
            "run_id": given,
            "own": not given,
            "name": name,
            "token": token,
            "status": "KILLED",  # of a run of its own, if nobody closes the stream
        }
        self._process = os.getpid()
        folder = spool.folder().absolute()  # the caller may go to another one
        self.path = folder / f"{name}-{token[:8]}{spool.STREAM}"
        try:
            (self.path / FILES).mkdir(parents=True)
            self._lock = FileLock(self.path / spool.LOCK, thread_local=False)
            self._lock.acquire()  # here, and released by the thread
            _write(self.path, self._about)
            self._journal = (self.path / JOURNAL).open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot write to the spool {spool.folder()} ({error.strerror or error}); set "
                f"{variables.SPOOL} to a folder that can be written"
            ) from None
        self._stop, self._closed, self._why = threading.Event(), False, ""
        self._share, self._sendings, self._least = share, 0, math.inf
        self.seconds = self.price = 0.0
        self._thread = threading.Thread(target=self._work, name="lsa-stream", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def run_id(self) -> str:
        """ID of the run; empty until the stream has made one."""
        return self._about["run_id"]

    @property
    def is_open(self) -> bool:
        """Whether it takes numbers; in a process that was forked off it does not: only this one's
        thread sends.
        """
        return not self._closed and self._process == os.getpid()

    def put(self, values: Mapping[str, float], step: int) -> None:
        """Queue numbers to be logged at a step; those that are not finite are left out."""
        now = int(time.time() * 1000)
        lines = [
            json.dumps([taken(name), float(value), now, step])
            for name, value in values.items()
            if math.isfinite(value)
        ]
        if lines and self.is_open:
            self._journal.write("\n".join(lines) + "\n")
            self._journal.flush()

    def file(self, name: str) -> Path:
        """Path at which to write a file; it becomes an artifact when the stream is closed."""
        path = self.path / FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self, status: str = "FINISHED") -> None:
        """Send the rest. What the store does not take stays, and a line says so.

        Args:
            status: That a run of the stream's own is ended with.
        """
        if not self.is_open:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._journal.close()
        self._about["status"] = status
        with contextlib.suppress(OSError):
            _write(self.path, self._about)
        self._stop.set()
        self._thread.join(LAST)
        if self._thread.is_alive() or self.path.exists():
            log.warning(
                "%s is not all logged (%s); it is kept in %s; deliver it with: lsa sync",
                f"run {self.run_id}" if self.run_id else self._about["name"],
                self._why or f"the store has not answered in {LAST:.0f} s",
                self.path,
            )

    def _work(self) -> None:
        """Send until the stream is closed, then to its end."""
        while not self._stop.wait(self._pause()):
            self._tried(self._send)
        complete = self._tried(lambda: send(self.path, self._about))
        complete = complete and self._tried(lambda: _finish(self.path, self._about))
        self._lock.release()
        if complete:
            shutil.rmtree(self.path, ignore_errors=True)

    def _pause(self) -> float:
        """Seconds to the next sending."""
        known = self._share is not None and math.isfinite(self._least)
        return max(PAUSE, self._least / self._share) if known else PAUSE  # pyright: ignore

    def _send(self) -> None:
        """Send what is new, and see what that takes; the first one makes the run and connects."""
        began, sent = time.thread_time(), send(self.path, self._about)
        now = time.thread_time()
        self.seconds = now
        if sent and self._sendings:
            self._least, self.price = min(self._least, now - began), (now - began) / sent
        self._sendings += bool(sent)

    def _tried(self, work: Callable[[], object]) -> bool:
        """Whether the store has taken it; a store that did not answer just now is not asked."""
        try:
            done = store.ask(lambda: bool(work() or True), False)
            self._why = "" if done else self._why or "the store does not answer"
        except Exception as error:  # the thread must live: what comes later may be taken
            failed = isinstance(error, FAILED)
            done, self._why = False, store.explained(error) if failed else one_line(error)
        return done


def send(path: Path, about: dict[str, Any]) -> int:
    """Log all lines of a journal that the store does not have yet; returns how many."""
    journal, marker = path / JOURNAL, path / SENT
    start = _sent(marker, journal)
    with journal.open("rb") as lines:
        lines.seek(start)
        new = lines.read()
    end = new.rfind(b"\n") + 1  # the last line may be in the making
    if not end and about["run_id"]:
        return 0
    if not about["run_id"]:
        about["run_id"] = _made(about)
        _write(path, about)
    metrics = [Metric(*json.loads(line)) for line in new[:end].splitlines()]
    for i in range(0, len(metrics), BATCH):
        client().log_batch(about["run_id"], metrics=metrics[i : i + BATCH])
    with files.replaced(marker) as replaced:
        replaced.write_text(str(start + end))
    return len(metrics)


def _sent(marker: Path, journal: Path) -> int:
    """Bytes of a journal that the store has; 0 if unknown, so that all is sent."""
    try:
        start = int(marker.read_text())
        return start if 0 <= start <= journal.stat().st_size else 0
    except (OSError, ValueError):
        return 0


def client() -> mlflow.MlflowClient:
    """MLflow's own, for a store of any kind and with the settings of the caller's process."""
    return mlflow.MlflowClient()


def _made(about: Mapping[str, Any]) -> str:
    """A new run, or the one that an earlier try has made."""
    if known := _known(about):
        return known[0]
    token = about["token"]
    experiment = mlflow.tracking.fluent._get_experiment_id()  # pyright: ignore
    tags = resolve_tags({TOKEN: token})
    return client().create_run(experiment, tags=tags, run_name=about["name"]).info.run_id


def _known(about: Mapping[str, Any]) -> list[str]:
    """IDs of the runs that the store has made for a stream."""
    experiments = [e.experiment_id for e in client().search_experiments()]
    runs = client().search_runs(experiments, f"tags.`{TOKEN}` = '{about['token']}'")
    return [run.info.run_id for run in runs]


def _finish(path: Path, about: Mapping[str, Any]) -> None:
    """Log the files, and end a run of the stream's own."""
    root = path / FILES
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        folder = file.parent.relative_to(root).as_posix()
        client().log_artifact(about["run_id"], str(file), None if folder == "." else folder)
    if about["own"]:
        for double in set(_known(about)) - {about["run_id"]}:  # its request's answer was lost
            client().delete_run(double)
        client().set_terminated(about["run_id"], about["status"])


def deliver() -> Iterator[tuple[str, str]]:
    """Send the rest of every abandoned stream that is for the store in use.

    Yields:
        A stream's name, and what became of it.
    """
    for path in sorted(spool.folder().glob(f"*{spool.STREAM}")):
        with contextlib.suppress(Timeout), FileLock(path / spool.LOCK).acquire(timeout=0):
            yield path.name, _delivered(path)


def _delivered(path: Path) -> str:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if address.canonical(to := about["store"]) != store.identity():
            return f"stays: it is for the store {to}"
        send(path, about)
        _finish(path, about)
        shutil.rmtree(path, ignore_errors=True)
        return f"run {about['run_id']}"
    except FAILED as error:
        return f"stays: {store.explained(error)}"
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return (
            f"stays: it is kept in {spool.set_aside(path)}, since it is damaged ({one_line(error)})"
        )


def waiting() -> list[Path]:
    """Folders of the streams that no process works on any more."""
    left = []
    for path in sorted(spool.folder().glob(f"*{spool.STREAM}")):
        with contextlib.suppress(Timeout), FileLock(path / spool.LOCK).acquire(timeout=0):
            left.append(path)
    return left


def _write(path: Path, about: Mapping[str, Any]) -> None:
    with files.replaced(path / ABOUT) as new:
        new.write_text(json.dumps(about), encoding="utf-8")

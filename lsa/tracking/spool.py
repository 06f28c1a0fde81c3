"""Results kept on this disk until the tracking store has them.

A run writes down what it logs in a folder, its entry: `<step>-<token>.part` while it measures. When
all is measured, the entry is flushed to the disk and renamed, so that it is there whole or not at
all, and only then logged and removed. An entry that the store does not take stays, for `lsa sync`.

The name says the step and its store, and which run of the step: neither another store's run of the
same step nor another process's touches it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pydantic
from filelock import FileLock, Timeout
from typing_extensions import NotRequired, TypedDict

from lsa.runtime import files, variables
from lsa.runtime.errors import InputError
from lsa.tracking import address

log = logging.getLogger(__name__)
RUN, FILES, CHECKPOINTS, PART, LOCK = "run.json", "files", "checkpoints", ".part", "lock"
STREAM = ".stream"  # ending of a folder of `lsa.tracking.stream`
DAMAGED = "damaged"  # folder of the entries that cannot be read
DATASET = {"name", "digest", "source_type", "source"}


class NotLogged(Exception):
    """Results stay in the spool since the store did not take them. The message is one line."""


class Damaged(InputError):
    """An entry of the spool is not what was written."""


class LoggedMetric(TypedDict):
    """Fields of MLflow's metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int
    model_id: NotRequired[str]
    dataset_name: NotRequired[str]
    dataset_digest: NotRequired[str]


@dataclass
class Content:
    """Everything that a run logs, except its files."""

    name: str
    experiment: str
    store: str  # address that it is for, without a password
    registry: str = ""  # where its checkpoint is to be registered; empty: not known
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[LoggedMetric] = field(default_factory=list)
    models: list[str] = field(default_factory=list)  # ids of the checkpoints that it measures
    dataset: dict[str, str] = field(default_factory=dict)  # fields of MLflow's
    # Run of a training → numbers measured on its checkpoint, which stand on it too.
    trainings: dict[str, list[LoggedMetric]] = field(default_factory=dict)
    experiment_id: str = ""  # when it is not the project's own
    run_id: str = ""  # once the store has given one
    started: int = 0  # milliseconds since 1970
    ended: int = 0
    # Names the run before the store does: what was sent twice, or cut short, is found by it.
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


class Entry:
    """A run's content and files, on this disk."""

    def __init__(self, path: Path, content: Content, *, kept: bool) -> None:
        self.path = path
        self.content = content
        self.kept = kept  # whether it is whole on the disk
        self._began = time.monotonic()
        self._lock = FileLock(path / LOCK)  # held while its process measures

    def file(self, name: str) -> Path:
        """Path at which to write an artifact of that name."""
        path = self.path / FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def files(self) -> list[str]:
        """Names of the artifacts."""
        root = self.path / FILES
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    @contextlib.contextmanager
    def checkpoint(self, name: str) -> Iterator[Path]:
        """An empty folder for a checkpoint, which counts once it is whole."""
        path = self.path / CHECKPOINTS / name
        new = path.with_name(path.name + PART)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(path, ignore_errors=True)
        files.flush(new)
        new.replace(path)

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that are not logged yet, in the order of their names."""
        folders = (self.path / CHECKPOINTS).glob("*")
        return sorted(path for path in folders if path.suffix != PART)

    def keep(self) -> None:
        """Complete the entry: from now on the end of this process cannot lose it."""
        if self.kept:
            return
        # The clock may be set while a step runs; the time that it took does not change by that.
        seconds = time.monotonic() - self._began
        self.content.ended = self.content.started + round(1000 * seconds)
        self._write()
        self._release()
        files.flush(self.path)
        complete = self.path.with_suffix("")
        self.path.replace(complete)
        files.flush_names(complete.parent)
        self.path, self.kept = complete, True

    def name_run(self, run_id: str) -> None:
        """Note the run that the store has made of it."""
        self.content.run_id = run_id
        if self.kept:
            self._write()

    def _write(self) -> None:
        with files.replaced(self.path / RUN, durable=True) as new:
            new.write_text(json.dumps(asdict(self.content)), encoding="utf-8")

    def hold(self) -> None:
        """Keep other processes from taking its checkpoints, until it is kept, left or dropped."""
        self._lock.acquire()

    def _release(self) -> None:
        self._lock.release(force=True)
        (self.path / LOCK).unlink(missing_ok=True)

    def leave(self) -> None:
        """Give up an unfinished step's entry; its checkpoints stay for the next start."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name not in (CHECKPOINTS, LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._release()
        if not self.checkpoints():
            self.drop()

    def take(self, other: Path) -> None:
        """Take the checkpoints of an entry whose process has died; nothing if it still runs."""
        lock = FileLock(other / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        left = Entry(other, self.content, kept=False).checkpoints()
        for checkpoint in left:
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # a second one of this epoch
                checkpoint.replace(self.path / CHECKPOINTS / checkpoint.name)
        lock.release()
        shutil.rmtree(other, ignore_errors=True)

    def drop(self) -> None:
        """Remove the entry: the store has it."""
        self._lock.release(force=True)
        gone = self.path.with_suffix(PART)  # at once no entry any more, for whoever reads them
        with contextlib.suppress(OSError):
            self.path.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def folder() -> Path:
    """The folder of all entries."""
    return variables.folder(variables.SPOOL, ".lsa/spool")


def begin(key: str | None, content: Content) -> Entry:
    """A new entry, with the checkpoints that killed runs of the same step have left.

    Args:
        key: Of the step. None for what need not be kept, because it can be made again from the
            store.
        content: What is known already.

    Raises:
        InputError: Nothing can be written there.
    """
    content.started = content.started or int(time.time() * 1000)
    if key is None:
        return Entry(Path(tempfile.mkdtemp(prefix="lsa-run-")), content, kept=False)
    step = address.step_name(content.store, key)
    entry = Entry(folder() / f"{step}-{content.token[:8]}{PART}", content, kept=False)
    try:
        killed = list(folder().glob(f"{step}-*{PART}"))
        entry.path.mkdir(parents=True)
        entry.hold()
        for path in killed:
            entry.take(path)
    except OSError as error:
        raise InputError(
            f"cannot write to the spool {folder()} ({error.strerror or error}); results are kept "
            f"there until they are logged; set {variables.SPOOL} to a folder that can be written"
        ) from None
    return entry


def entries() -> list[Path]:
    """Folders of the whole entries, the oldest first."""
    folders = []
    for path in folder().glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has delivered it just now
            complete = path.is_dir() and path.suffix not in (PART, STREAM) and path.name != DAMAGED
            if complete:
                folders.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(folders)]


def find(key: str, store: str) -> Entry | None:
    """The whole entry of a step that is for that store; a damaged one is set aside."""
    step = address.step_name(store, key)
    for path in entries():
        if path.name.startswith(step):
            try:
                return read(path)
            except Damaged as error:
                log.warning("%s; it is kept in %s", error, set_aside(path))
    return None


def read(path: Path) -> Entry:
    """The whole entry in a folder.

    Raises:
        Damaged: It is not what was written.
    """
    try:
        stored = json.loads((path / RUN).read_text(encoding="utf-8"))
        content = pydantic.TypeAdapter(Content).validate_python(stored)
        if "lsa.key" not in content.tags or content.dataset.keys() not in (set(), DATASET):
            raise ValueError("fields are missing")
    except pydantic.ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise Damaged(f"{path / RUN} is damaged ({field}: {error.errors()[0]['msg']})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path / RUN} is damaged ({error})") from None
    return Entry(path, content, kept=True)


def set_aside(path: Path) -> Path:
    """Move an entry that cannot be delivered out of the spool; returns its new folder."""
    target = folder() / DAMAGED / path.name
    target.parent.mkdir(exist_ok=True)
    return path.replace(target)


def damaged() -> list[Path]:
    """Folders of the entries that were set aside."""
    return sorted((folder() / DAMAGED).glob("*"))

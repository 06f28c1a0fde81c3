"""What runs log, on this disk until the tracking store has it.

A run writes down what it logs in a folder, its entry: `<name>.part` while it measures. When all is
measured the entry is flushed to the disk and renamed, so that it is there whole or not at all, and
only then logged and removed. An entry that the store does not take stays, for `lsa sync`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lsa.runtime.errors import InputError

FOLDER = "LSA_SPOOL"  # environment variable: where entries are kept
RUN, FILES, CHECKPOINTS, PART = "run.json", "files", "checkpoints", ".part"
NAME = 32  # characters of a step's key that name its entry


class NotLogged(Exception):
    """Something is measured and kept in the spool; the store did not take it. One line."""


@dataclass
class Content:
    """What a run logs, but for its files."""

    name: str
    experiment: str
    store: str  # address that it is for, without a password
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # fields of MLflow's
    models: list[str] = field(default_factory=list)  # ids of the checkpoints that it measures
    dataset: dict[str, str] = field(default_factory=dict)  # fields of MLflow's
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

    def file(self, name: str) -> Path:
        """Where an artifact of that name is to be written."""
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
        _flush(new)
        new.replace(path)

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that are not logged yet, in the order of their names."""
        found = (self.path / CHECKPOINTS).glob("*")
        return sorted(path for path in found if path.suffix != PART)

    def keep(self) -> None:
        """Make the entry whole: from here on, no end of this process loses it."""
        if self.kept:
            return
        # The clock may be set while a step runs; the time that it took does not change by that.
        seconds = time.monotonic() - self._began
        self.content.ended = self.content.started + round(1000 * seconds)
        self._write()
        _flush(self.path)
        whole = self.path.with_suffix("")
        shutil.rmtree(whole, ignore_errors=True)  # of the same step, measured before
        self.path.replace(whole)
        _flush_folder(whole.parent)
        self.path, self.kept = whole, True

    def name_run(self, run_id: str) -> None:
        """Note the run that the store has made of it."""
        self.content.run_id = run_id
        if self.kept:
            self._write()

    def _write(self) -> None:
        new = self.path / f"{RUN}{PART}"
        new.write_text(json.dumps(asdict(self.content)), encoding="utf-8")
        _flush_file(new)
        new.replace(self.path / RUN)

    def leave(self) -> None:
        """The step has not been measured to its end: only its checkpoints may still be of use."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name != CHECKPOINTS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not self.checkpoints():
            self.drop()

    def drop(self) -> None:
        """Remove the entry: the store has it."""
        shutil.rmtree(self.path, ignore_errors=True)


def folder() -> Path:
    """Where entries are kept."""
    return Path(os.environ.get(FOLDER) or Path(".lsa", "spool"))


def begin(key: str | None, content: Content) -> Entry:
    """A new entry.

    Args:
        key: Of the step, which names the entry: the same step measured again replaces it. None for
            what need not be kept, because it can be made again from the store.
        content: What is known already.

    Raises:
        InputError: Nothing can be written there.
    """
    content.started = content.started or int(time.time() * 1000)
    if key is None:
        return Entry(Path(tempfile.mkdtemp(prefix="lsa-run-")), content, kept=False)
    path = folder() / f"{key[:NAME]}{PART}"
    entry = Entry(path, content, kept=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        entry.leave()  # what a killed process had begun
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to the spool {folder()} ({error.strerror or error}); results are kept "
            f"there until they are logged; set {FOLDER} to a folder that can be written"
        ) from None
    return entry


def entries() -> list[Path]:
    """Folders of the whole entries."""
    return sorted(path.parent for path in folder().glob(f"*/{RUN}") if path.parent.suffix != PART)


def find(key: str, store: str) -> Entry | None:
    """The whole entry of a step that is for that store."""
    path = folder() / key[:NAME]
    entry = read(path) if path in entries() else None
    return entry if entry and entry.content.store == store else None


def read(path: Path) -> Entry:
    """The whole entry in a folder.

    Raises:
        InputError: It is damaged.
    """
    try:
        stored = json.loads((path / RUN).read_text(encoding="utf-8"))
        names = {one.name for one in fields(Content)}
        content = Content(**{k: v for k, v in stored.items() if k in names})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"the spool's entry {path} is damaged ({error}); move it away to go on"
        ) from None
    return Entry(path, content, kept=True)


# --- to the disk ---------------------------------------------------------------------------------


def _flush(folder: Path) -> None:
    """Have everything in a folder on the disk."""
    for path in folder.rglob("*"):
        _flush_folder(path) if path.is_dir() else _flush_file(path)
    _flush_folder(folder)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)

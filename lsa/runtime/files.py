"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

SCRATCH = ".scratch"  # suffix of a file that is being written


@contextlib.contextmanager
def replaced(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A new file beside `path`, which takes its place once the block has written it.

    Another process sees the old file or the new one. Two processes that write at once do not share
    the new file: the last to end wins.

    Args:
        path: The file; its folder is made.
        durable: Flush the content to the disk first, so that no loss of power leaves half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{SCRATCH}")
    try:
        yield scratch
        if durable:
            flush(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, and what processes left that were killed while they wrote it."""
    path.unlink(missing_ok=True)
    for scratch in path.parent.glob(f".{path.name}.*{SCRATCH}"):
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file to the disk, or a folder with everything in it."""
    if not path.is_dir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return
    for inside in path.iterdir():
        flush(inside)
    flush_names(path)


def flush_names(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)

"""One plain line for errors of the machine: a full disk, a folder that cannot be written."""

from __future__ import annotations

import errno
from collections.abc import Iterator

RULES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file grows beyond the limit of this process; raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "there is no permission; choose another folder or correct its rights",
    errno.EPERM: "there is no permission; choose another folder or correct its rights",
    errno.EIO: "the disk fails, or takes no larger file; look after it",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOMEM: "there is not enough memory; take fewer samples or workers",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}
# What SQLite, safetensors and NumPy say instead, through MLflow: part of the text -> the same.
TEXTS = {
    " requested and ": errno.ENOSPC,  # … bytes, and fewer written
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EACCES,
    "unable to open database file": errno.EACCES,
    "disk I/O error": errno.EIO,
    "can't allocate memory": errno.ENOMEM,  # torch, on a CPU
    "out of memory": errno.ENOMEM,  # torch, on a GPU
    "failed to map segment from shared object": errno.ENOMEM,  # an import
    "can't start new thread": errno.ENOMEM,
    **{f"(os error {number})": number for number in RULES},
}
DATABASE = "the store's database: "


def explained(error: BaseException) -> str | None:
    """One line about an error of the machine; None for any other error."""
    for cause in chain(error):
        if isinstance(cause, MemoryError):
            return f"{RULES[errno.ENOMEM]}, then start again"
        if isinstance(cause, RecursionError):
            return "the network or its data nest deeper than Python's stack; make them flatter"
        if isinstance(cause, OSError) and cause.errno in RULES:
            path = cause.filename2 or cause.filename  # of a copy, where it was to go
            where = f"{path}: " if path else ""
            return f"{where}{RULES[cause.errno]}, then start again"
    for cause in chain(error):
        for text, number in TEXTS.items():
            if text in str(cause):
                where = DATABASE if "sqlite" in f"{type(cause)} {cause}" else ""
                return f"{where}{RULES[number]}, then start again"
    return None


def pipe_closed(error: BaseException) -> bool:
    """Whether the reader of the output has gone, as in `lsa show | head`."""
    return any(isinstance(cause, BrokenPipeError) for cause in chain(error))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that caused it, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__

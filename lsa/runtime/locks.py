"""One process at a time per step: file locks, which the system releases when their holder dies."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock


@contextlib.contextmanager
def claim(store: str, key: str) -> Iterator[None]:
    """Hold `key` of a store alone on this machine; wait for whoever holds it now.

    Two studies on one store meet here: the second waits for the step that the first computes, then
    finds it finished. Processes on other machines do not see each other's locks.

    Args:
        store: Address of the tracking store.
        key: What is claimed.
    """
    name = hashlib.sha256(f"{store}\0{key}".encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir(), f"lsa-claims-{_user()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / name, poll_interval=0.2):
        yield


def _user() -> str | int:
    """Who owns the folder: a container's user may have a number and no name."""
    return os.getuid() if hasattr(os, "getuid") else getpass.getuser()

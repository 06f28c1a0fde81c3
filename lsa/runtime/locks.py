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
    finds it finished. Processes on other machines do not see each other's locks, unless they share
    the user's home.

    Args:
        store: What names the tracking store, the same for all of its addresses.
        key: What is claimed.
    """
    name = hashlib.sha256(f"{store}\0{key}".encode()).hexdigest()[:32]
    with FileLock(_folder() / name, poll_interval=0.2):
        yield


def _folder() -> Path:
    """Folder of the user's locks, the same for all processes: TMPDIR differs between batch jobs."""
    with contextlib.suppress(OSError, RuntimeError):  # a container's user may have no home
        folder = Path.home() / ".cache" / "lsa" / "locks"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    root = "/tmp" if os.name == "posix" else tempfile.gettempdir()
    folder = Path(root, f"lsa-locks-{_user()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _user() -> str | int:
    """Who owns the folder: a container's user may have a number and no name."""
    return os.getuid() if hasattr(os, "getuid") else getpass.getuser()

"""The cache on this disk: decoded images and other files that can be made anew."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$LSA_CACHE`, else `~/.cache/lsa`."""
    return Path(os.environ.get("LSA_CACHE") or "~/.cache/lsa").expanduser()


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the cache, of which another process sees all or nothing.

    A folder that cannot be written costs time alone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            temporary.replace(path)
    except OSError as error:
        kind = path.parent.name
        log.warning("%s are not cached: %s; set LSA_CACHE to a writable folder", kind, error)

"""The cache on this disk: decoded images and other files that can be made anew."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from lsa.runtime import files

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$LSA_CACHE`, else `~/.cache/lsa`."""
    return Path(os.environ.get("LSA_CACHE") or "~/.cache/lsa").expanduser()


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the cache, of which another process sees all or nothing.

    Where the folder cannot be written, nothing is kept.
    """
    try:
        with files.replaced(path) as new:
            write(new)
    except OSError as error:
        kind = path.parent.name
        log.warning("%s are not cached: %s; set LSA_CACHE to a writable folder", kind, error)

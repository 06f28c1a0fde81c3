"""The cache on this disk: decoded images and other files that can be made anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lsa.runtime import files, variables

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$LSA_CACHE`, else `~/.cache/lsa`."""
    return variables.folder(variables.CACHE, "~/.cache/lsa")


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the cache. Other processes see the complete file or none.

    Where the folder cannot be written, nothing is kept.
    """
    try:
        with files.replaced(path) as new:
            write(new)
    except OSError as error:
        kind = path.parent.name
        log.warning(
            "%s are not cached: %s; set %s to a writable folder", kind, error, variables.CACHE
        )

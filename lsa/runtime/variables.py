"""lsa's own environment variables: their names, and the only place that reads them.

A variable is read when its value is needed, so a program may set it after importing lsa. An empty
one counts as not set. What each means is in docs/environment.md.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from lsa.runtime.errors import InputError

DATA, CACHE, SPOOL = "LSA_DATA", "LSA_CACHE", "LSA_SPOOL"  # folders
CHUNK, GRAPH_MEMORY, LAYOUT = "LSA_CHUNK", "LSA_GRAPH_MEMORY", "LSA_LAYOUT"
# Switched off by `off`.
CONSISTENCY, KEEP_FREED, CONDA_STANDIN = "LSA_CONSISTENCY", "LSA_KEEP_FREED", "LSA_CONDA_STANDIN"
PYTHON = "LSA_PYTHON"  # set for the stand-in of conda, which reads it


def folder(name: str, usual: str) -> Path:
    """The folder that a variable names, else the usual one; `~` is the user's home."""
    return Path(os.environ.get(name) or usual).expanduser()


def off(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable switches something off."""
    return environment.get(name) == "off"


def word(name: str, words: Collection[str]) -> str | None:
    """One of several words; None where the variable is not set.

    Raises:
        InputError: Another word.
    """
    text = os.environ.get(name, "")
    if text and text not in words:
        raise InputError(f"{name}={text!r} is none of {', '.join(words)}; correct or unset it")
    return text or None


def whole_number(name: str, least: int) -> int | None:
    """A whole number, `2e9` as well; None where the variable is not set.

    Raises:
        InputError: No whole number, or one below the least.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
        if value.is_integer() and value >= least:
            return int(value)
    except ValueError:
        pass
    raise InputError(f"{name}={text!r} is no whole number ≥ {least}; correct or unset it")

"""Figures drawn once: kept as PNG in the working folder, under a hash of all that they show.

Drawing takes nearly all the time of a report, and little of a project changes between two.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsa import plots
from lsa.memory import provenance

FOLDER = Path(".lsa", "figures")
KEPT = 200  # files, the newest; a report has about ten
START = b"\x89PNG\r\n\x1a\n"  # of every PNG file
END = b"IEND\xaeB`\x82"


def png(draw: Callable[..., Any], *content: Any) -> bytes:
    """The figure that `draw(*content)` makes, as a PNG file.

    Args:
        draw: A function of `lsa.plots`.
        *content: Numbers, text, arrays, and lists, tuples and mappings of them.
    """
    code = provenance.code_hash(draw.__module__)
    about = [code, plots.MATPLOTLIB, draw.__module__, draw.__name__, _plain(content)]
    file = FOLDER / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.png"
    with contextlib.suppress(OSError):
        kept = file.read_bytes()
        if kept.startswith(START) and kept.endswith(END):
            file.touch()
            return kept
    with _no_collection():
        drawn = plots.png(draw(*content))
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time alone
        _keep(file, drawn)
    return drawn


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage: one through all that MLflow loads takes as long as a figure does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _keep(file: Path, drawn: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_bytes(drawn)
    scratch.replace(file)
    newest = sorted(file.parent.glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in newest[KEPT:]:
        old.unlink(missing_ok=True)


def _plain(content: Any) -> Any:
    """The same of lists, dicts, numbers and text."""
    if isinstance(content, np.ndarray | np.generic):
        return content.tolist()
    if isinstance(content, Mapping):
        return [[_plain(key), _plain(value)] for key, value in content.items()]
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_plain(value) for value in content]
    return content

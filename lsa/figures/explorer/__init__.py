"""The explorer: a page in one file in which the checkpoints of a project are looked at.

Plotly draws; it lies in the page, packed, so that nothing is fetched. The page's own code chooses
what is drawn, and says the same as text.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from lsa.figures.axes import COLOURS, MARKERS
from lsa.figures.page import STYLE

FOLDER = Path(__file__).parent
SYMBOLS = {  # Plotly's names of the markers that the figures have
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down",
    "P": "cross", "X": "x",
}  # fmt: skip


def page(content: Mapping[str, Any]) -> str:
    """The page of a project's content, which `lsa.reports.explorer` reads.

    Content and library stand in it compressed, as base64: no text of a store is part of the markup,
    and the page's code shows texts as text alone.
    """
    looks = {"colours": COLOURS, "symbols": [SYMBOLS[marker] for marker in MARKERS]}
    data = json.dumps({**content, **looks}, ensure_ascii=False, allow_nan=False)
    filled = {
        "title": html.escape(content["title"]),
        "style": STYLE + _text("page.css"),
        "data": _packed(data),
        "library": _library(),
        "script": _text("page.js") + _text("charts.js") + _text("details.js") + _text("start.js"),
    }
    # In one pass: what is filled in may look like a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], _text("page.html"))


def number(value: float) -> float | None:
    """To six digits, which no error reaches; None where JSON has no such number."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def numbers(values: Iterable[float]) -> list[float | None]:
    """To four digits, as a line is drawn."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


@cache
def _library() -> str:
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")

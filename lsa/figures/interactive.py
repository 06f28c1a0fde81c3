"""Pages to explore a result in a browser, each one file that works offline."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from lsa.probe import Result

TEMPLATE = Path(__file__).with_name("surface.html")
FIELDS = ("loss", "loss_error", "rise_error", "error", "error_error")


def pages(probe: str, result: Result, title: str) -> dict[str, str]:
    """File name → HTML of the probe's page; empty for a probe without one."""
    return {f"{probe}.html": surface(result, title)} if probe == "surface" else {}


def surface(result: Result, title: str) -> str:
    """The loss on a plane, to be turned and read: `surface.html` with title and numbers filled in.

    The numbers stand in a script as JSON, where `<` is written so that no text of theirs can end
    it; the page shows texts as text, never as markup.
    """
    content = {
        "title": title,
        **plane(result),
        "metrics": [
            [name, _number(m.value), m.unit, {k: _number(e) for k, e in m.errors.items()}]
            for name, m in result.metrics.items()
        ],
        "notes": list(result.notes),
    }
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    text = TEMPLATE.read_text(encoding="utf-8")
    filled = {"title": html.escape(title), "data": data}
    # In one pass: what is filled in may look like a placeholder.
    return re.sub(r"\{\{(title|data)\}\}", lambda match: filled[match[1]], text)


def plane(result: Result) -> dict[str, Any]:
    """The grid of a surface and the checkpoints marked on it, as JSON has them."""
    arrays = {k.partition(".")[2]: v for k, v in result.arrays.items() if k.startswith("surface.")}
    return {
        "plane": str(arrays["plane"]),
        "labels": [str(label) for label in arrays["labels"]],
        "x": _numbers(arrays["x"]),
        "y": _numbers(arrays["y"]),
        "grid": {name: [_numbers(row) for row in arrays[name]] for name in FIELDS},
        "marks": {
            "name": [str(name) for name in arrays["mark"]],
            **{key: _numbers(arrays[f"mark_{key}"]) for key in ("x", "y", "distance", *FIELDS)},
        },
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: Any) -> float | None:
    """To eight digits, which no standard error reaches; None where JSON has no such number."""
    return float(f"{float(value):.8g}") if np.isfinite(value) else None

"""Measurements during a training; `lsa.watch` starts them.

The callbacks need the library that they are of, so they are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "HuggingFaceCallback": "lsa.watching.huggingface",
    "LightningCallback": "lsa.watching.lightning",
    "Watch": "lsa.watching.watched",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lsa.watching' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOMES)

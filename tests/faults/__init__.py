"""Faults injected on purpose, each telling whether anything was lost: the rows of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One kind of fault, and what came of it every time."""

    fault: str
    injected: str  # how
    times: int
    lost: str
    seen: str  # by the user

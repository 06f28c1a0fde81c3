"""Faults injected on purpose into real processes, and what was lost by them.

`python -m tests.faults` runs them all and writes docs/reliability.md; `--only server` runs one
module again and replaces its rows. Each module has `rows(folder)`, which raises AssertionError when
anything was lost.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    fault: str
    injected: str  # how
    times: int
    lost: str
    seen: str  # by the user

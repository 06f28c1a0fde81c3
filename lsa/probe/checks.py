"""What a probe declares of its numbers so that a report can check them against others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Same:
    """A metric that must equal one of another probe, where both saw equally many samples."""

    symbol: str  # how the report calls the number: λ_max
    metric: str  # of the probe that declares it
    other: str  # `probe/metric`
    # Relative; None: two estimates from random vectors, compared by their standard errors.
    within: float | None = None


@dataclass(frozen=True)
class AtMost:
    """low ≤ high + relative·|low| + absolute, of one result."""

    text: str  # what the report says, with metrics of the probe in braces: "loss {loss:.4g} ≤ 1"
    low: str | float  # metric or number
    high: str | float
    relative: float = 0.0
    absolute: float = 0.0

"""A warning that steps go too far: off by default, since it warns of as much that never comes.

What it is worth was measured on trainings other than those that it was made with
(`python -m benchmarks.alarm`; docs/watch.md has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

LEAST = 2.0  # critical factor of a step that is not too long
AFTER = 20  # steps without an alarm, in which every training goes too far


def too_far(step: int, row: Mapping[str, float]) -> bool | None:
    """Whether a step went too far on the probe set: uphill, or over half of its critical length.

    None where that was not measured, and in the first steps.
    """
    if "gain" not in row or step <= AFTER:
        return None
    return row["gain"] < 0 or row.get("critical_factor", math.inf) < LEAST


class Alarm:
    """Tells when steps went too far in some measurements in a row.

    Args:
        times: How many; 0: never.
    """

    def __init__(self, times: int) -> None:
        self._times, self._run = times, 0
        self.steps: list[int] = []  # at which it was raised

    def sees(self, step: int, row: Mapping[str, float]) -> bool:
        """Whether the alarm is raised by the numbers of a step."""
        over = too_far(step, row) if self._times else None
        if over is None:
            return False
        self._run = self._run + 1 if over else 0
        if self._run != self._times:
            return False
        self.steps.append(step)
        return True

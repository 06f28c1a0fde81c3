"""The parts of a watch, which fail one by one: a training goes on without what has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from lsa.runtime.errors import brief
from lsa.watching.budget import Budget

log = logging.getLogger("lsa.watch")
T = TypeVar("T")


class Parts:
    """Runs work for a part: timed, and switched off for good where it fails.

    Args:
        budget: That the time counts for.
        strict: Raise what goes wrong, in place of one line and no more of the part.
    """

    def __init__(self, budget: Budget, *, strict: bool) -> None:
        self._budget, self._strict = budget, strict
        self._off: set[str] = set()
        self._causes: set[str] = set()  # that were said

    def are_on(self, *parts: str) -> bool:
        """Whether none of these has failed."""
        return self._off.isdisjoint(parts)

    def run(self, part: str, step: int, work: Callable[[], T], *, ends: bool = True) -> T | None:
        """Do the work; None where the part is off.

        Args:
            part: Its name.
            step: Of the training, for the line that is said.
            work: To do.
            ends: Whether a measurement ends with it; see `Budget.timed`.
        """
        if part in self._off:
            return None
        try:
            with self._budget.timed(part, ends=ends):
                return work()
        except Exception as error:
            if self._strict:
                raise
            self._off.add(part)
            cause = brief(error)
            if cause not in self._causes:  # several parts fail of one
                log.warning("watch: %s is off from step %d on: %s", part, step, cause)
            self._causes.add(cause)
            return None

"""What a watch has measured, as columns that stay small over a long training."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any


class History:
    """Numbers by name and step; 16 bytes each."""

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Numbers of one step."""
        for name, value in row.items():
            self._steps.setdefault(name, array("q")).append(step)
            self._values.setdefault(name, array("d")).append(value)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number; empty where it was never measured."""
        return [*self._steps.get(name, ())], [*self._values.get(name, ())]

    def rows(self) -> list[dict[str, float]]:
        """One mapping a step, with `step` first."""
        by_step: dict[int, dict[str, float]] = {}
        for name in self._steps:
            for step, value in zip(*self.column(name), strict=True):
                by_step.setdefault(step, {"step": step})[name] = value
        return [by_step[step] for step in sorted(by_step)]

    def frame(self) -> Any:
        """A pandas DataFrame, one row a step, nan where a number was not measured."""
        import pandas

        return pandas.DataFrame(self.rows())

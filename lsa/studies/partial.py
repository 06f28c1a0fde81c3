"""Partial results of a step that outlive its process, in a file that only grows."""

from __future__ import annotations

import contextlib
import json
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path

SCRATCH = Path(".lsa", "partial")  # in the working folder, as the states of trainings are


class Numbers(UserDict[str, list[float]]):
    """Name → numbers; each entry is appended to a file as it is set."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.data.update(_read(path))

    def __setitem__(self, name: str, values: list[float]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A newline before, not after: what follows a line that a kill tore is not lost.
            file.write("\n" + json.dumps([name, values]))
        super().__setitem__(name, values)


@contextlib.contextmanager
def numbers(step: str) -> Iterator[Numbers]:
    """Numbers that an interrupted run of a step computed; deleted once the step has finished.

    Args:
        step: Names the step and its store, as `store.step_name` does.
    """
    stored = Numbers(SCRATCH / f"{step}.jsonl")
    yield stored
    stored.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, list[float]]:
    """The complete lines of the file."""
    stored: dict[str, list[float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # torn by a kill, or empty
                name, values = json.loads(line)
                stored[name] = values
    return stored

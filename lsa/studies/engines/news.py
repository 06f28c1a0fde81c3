"""Where the workers of a cluster leave their progress.

A module of its own: the process that holds it needs neither torch nor MLflow.
"""

from __future__ import annotations


class News:
    """A Ray actor that keeps the workers' progress until the study asks for it."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, int, int, str]] = {}

    def tell(self, title: str, done: int, total: int, text: str) -> None:
        """Keep the newest progress of a step."""
        self._told[title] = (title, done, total, text)

    def take(self) -> list[tuple[str, int, int, str]]:
        """All progress told since the last call."""
        told, self._told = list(self._told.values()), {}
        return told

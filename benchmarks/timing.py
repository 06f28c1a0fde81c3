"""Seconds, measured so that a machine's moods fall on all competitors alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def alternate(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each task over the rounds, of which each runs all tasks in turn."""
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            took[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in took.items()}

"""Seconds and bytes, measured so that a machine's moods fall on all competitors alike.

Where a GPU computes, its queue is empty when the clock starts and when it stops, and the bytes are
those of its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psutil
import torch

Found = TypeVar("Found")
INTERVAL = 0.01  # seconds between two looks at the memory


def timed(task: Callable[[], Found]) -> tuple[Found, float]:
    """What the task returns, and its seconds."""
    _wait()
    began = time.perf_counter()
    found = task()
    _wait()
    return found, time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each task over the rounds, of which each runs all tasks in turn."""
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            took[name].append(timed(task)[1])
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def peak(task: Callable[[], Found]) -> tuple[Found, float, int]:
    """What the task returns, its seconds, and the bytes by which this process grew meanwhile."""
    if torch.cuda.is_initialized():
        return _peak_on_card(task)
    process = psutil.Process()
    with contextlib.suppress(OSError, AttributeError):  # or what was freed would hide it
        ctypes.CDLL(None).malloc_trim(0)
    before = highest = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(INTERVAL):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found, seconds = timed(task)
    finally:
        done.set()
        watcher.join()
    return found, seconds, highest - before


def _peak_on_card(task: Callable[[], Found]) -> tuple[Found, float, int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, seconds = timed(task)
    return found, seconds, torch.cuda.max_memory_allocated() - before

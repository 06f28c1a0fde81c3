"""Progress of long work: a bar on a terminal, a line a minute elsewhere, or where it is sent."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from lsa.probe import Report

Sink = Callable[[str, int, int, str], None]  # title, done, total, text
_sink: Sink | None = None
_title: str | None = None


def redirect(sink: Sink | None) -> None:
    """Send this process's progress to `sink` instead of drawing it; None draws it again."""
    global _sink
    _sink = sink


@contextlib.contextmanager
def titled(title: str) -> Iterator[None]:
    """Show progress reported within the block under this title."""
    global _title
    before, _title = _title, title
    try:
        yield
    finally:
        _title = before


class Combined:
    """One count of work that is reported in parts, each from its own beginning.

    What a part may take at most, such as the products of a search, is known, and not what it
    takes: the end moves when a part ends early, the position never goes back.
    """

    def __init__(self) -> None:
        self._before = self._done = self._total = 0

    def so_far(self, done: int, total: int) -> tuple[int, int]:
        """Done and to be done at most, of all parts so far."""
        if done < self._done or (done == self._done and total != self._total):
            self._before += self._done
        self._done, self._total = done, total
        return self._before + done, self._before + max(done, total)


class Minute:
    """A line of progress at most once a minute, for output without a bar."""

    def __init__(self, say: Callable[[str], None], seconds: float = 60.0) -> None:
        self._say, self._seconds, self._last = say, seconds, time.monotonic()

    def __call__(self, line: Callable[[], str]) -> None:
        """Say a line if it is time."""
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            self._say(line())


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Report]:
    """A `report(done, total, text)` that draws a bar on stderr; a line a minute if no terminal."""
    sink, title, entire = _sink, _title or title, Combined()
    if sink is not None:
        yield lambda done, total, text="": sink(title, done, total, text)
        return
    if not sys.stderr.isatty():
        minute, began = Minute(_to_stderr), time.monotonic()

        def say(done: int, total: int, text: str = "") -> None:
            so_far, most = entire.so_far(done, total)
            spent = (time.monotonic() - began) / 60
            minute(lambda: f"{title}: {text} {so_far}/{most}, {spent:.0f} min")

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, count="starting")

        def draw(done: int, total: int, text: str = "") -> None:
            so_far, most = entire.so_far(done, total)
            count = f"{so_far}/{most} {text}"
            progress.update(task, completed=so_far, total=most, count=count)

        yield draw
        done = int(progress.tasks[task].completed)
        # The search has ended before its bound.
        progress.update(task, total=done, count=f"{done}/{done}")

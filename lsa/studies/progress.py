"""Progress of long work: a bar on a terminal, silence elsewhere, or wherever it is redirected."""

from __future__ import annotations

import contextlib
import sys
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
    """Name what is reported inside by this title."""
    global _title
    before, _title = _title, title
    try:
        yield
    finally:
        _title = before


@contextlib.contextmanager
def bar(title: str) -> Iterator[Report]:
    """A `report(done, total, text)` that draws a bar on stderr when that is a terminal."""
    sink, title = _sink, _title or title
    if sink is not None:
        yield lambda done, total, text="": sink(title, done, total, text)
        return
    if not sys.stderr.isatty():
        yield lambda done, total, text="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, text="")
        yield lambda done, total, text="": progress.update(
            task, completed=done, total=total, text=text
        )

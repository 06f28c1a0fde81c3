"""A progress bar on a terminal, silence elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lsa.probe import Report


@contextlib.contextmanager
def bar(title: str) -> Iterator[Report]:
    """A `report(done, total, text)` that draws a bar on stderr when that is a terminal."""
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

"""What a study shows while it runs: one line per step, or a live table on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lsa.studies.progress import Combined, Minute


class View(Protocol):
    """Shows the progress of a study."""

    def progress(self, title: str, done: int, total: int, text: str) -> None:
        """Show that a running step has done so many parts of a total."""
        ...

    def refresh(self, handles: Sequence[Any]) -> None:
        """Steps were started or finished."""
        ...

    def finished(self, handle: Any) -> None:
        """A step has finished, been reused or failed."""
        ...


class Lines:
    """A line for every step that ends, and one a minute that says how far a running step is."""

    def __init__(self, say: Callable[[str], None], total: int = 0) -> None:
        self._say, self._total, self._count = say, total, 0
        self._minute = Minute(say)

    def progress(self, title: str, done: int, total: int, text: str) -> None:
        """A line, at most once a minute."""
        self._minute(lambda: f"    {title}: {text} {done}/{total}")

    def refresh(self, handles: Sequence[Any]) -> None:
        """Nothing."""

    def finished(self, handle: Any) -> None:
        """The line."""
        self._count += 1
        of = f"/{self._total}" if self._total else ""
        lost = handle.state in ("failed", "unlogged")
        end = handle.error if lost else f"run {handle.run_id}"
        self._say(f"[{self._count}{of}] {handle.call.label}: {handle.state} ({end})")


def quiet() -> View:
    """Shows nothing."""
    return Lines(lambda line: None)


class Screen(Lines):
    """A live table of the running steps under a bar of all, with the time left."""

    def __init__(self, expected: Mapping[str, float], total: int, workers: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        super().__init__(self._print, total)
        self._expected = dict(expected)  # seconds of a step, by its kind
        self._took: dict[str, list[float]] = {}
        self._workers = workers
        self._began: dict[int, float] = {}  # running handle → when it was started
        self._news: dict[str, str] = {}  # label → how far it is
        self._combined: dict[str, Combined] = {}
        self._handles: Sequence[Any] = ()
        self._live = Live(get_renderable=self._table, console=self._console, transient=True)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)  # a run's ID stays in one piece

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def progress(self, title: str, done: int, total: int, text: str) -> None:
        """Keep the progress of a step for the next drawing."""
        so_far, most = self._combined.setdefault(title, Combined()).so_far(done, total)
        self._news[title] = f"{text} {so_far}/{most}" if most else text

    def refresh(self, handles: Sequence[Any]) -> None:
        """Note which steps run since when."""
        self._handles = list(handles)
        for handle in handles:
            if handle.state == "running":
                self._began.setdefault(id(handle), time.monotonic())

    def finished(self, handle: Any) -> None:
        """The line, and how long the step took."""
        began = self._began.pop(id(handle), None)
        if handle.state == "done" and began is not None:
            self._took.setdefault(handle.call.step, []).append(time.monotonic() - began)
        super().finished(handle)

    def seconds_left(self) -> float:
        """Expected time of what has not finished, shared by the workers."""
        now = time.monotonic()
        left = 0.0
        for handle in self._handles:
            if not handle.finished:
                spent = now - self._began.get(id(handle), now)
                left += max(0.0, self._seconds(handle.call.step) - spent)
        return left / self._workers

    def _seconds(self, step: str) -> float:
        took = self._took.get(step)
        return sum(took) / len(took) if took else self._expected.get(step, 0.0)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = sum(handle.finished for handle in self._handles)
        total = max(self._total, len(self._handles), 1)
        left = f"about {duration(self.seconds_left())} left" if self._handles else ""
        head, steps = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
        head.add_row(f"{done}/{total} steps", ProgressBar(total, done, width=20), left)
        for flexible in (False, True, False):  # on a narrow terminal the news are cut first
            steps.add_column(no_wrap=not flexible)
        now = time.monotonic()
        for handle in self._handles:
            if handle.state == "running":
                label, spent = handle.call.label, now - self._began.get(id(handle), now)
                news = Text(self._news.get(label, ""), no_wrap=True, overflow="ellipsis")
                steps.add_row(label, news, duration(spent))
        return Group(head, steps)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.1f} h"

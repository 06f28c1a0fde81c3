"""Where the numbers of a watch go: a run of MLflow, another's function, a line on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lsa.watching.budget import Budget
from lsa.watching.history import History
from lsa.watching.live import Line

Sink = Callable[[Mapping[str, float], int], None]
PREFIX = "watch/"
SENDING = 0.25  # of the budget, that the thread which sends may take


class Outputs:
    """Numbers on their way out.

    Args:
        sink: Takes them instead of MLflow.
        track: Whether they go to MLflow; a run's ID: into that one.
        live: Whether a line shows the newest.
        log_every: Steps between those whose norms go out.
        every: The same for the norms of blocks; they go out at the first step too.
    """

    def __init__(
        self, sink: Sink | None, *, track: bool | str, live: bool, log_every: int, every: int
    ) -> None:
        self._sink, self._track, self._live = sink, track if sink is None else False, live
        self._log_every, self._every = log_every, every
        self._stream: Any = None
        self._line: Line | None = None
        self._budget = Budget(None)
        self._last: int | None = None  # step whose numbers went out
        self._counted = 0.0  # seconds of sending that the budget knows of

    def open(self, budget: Budget) -> None:
        """Find the run, or make one, and start to send.

        Args:
            budget: That sending has a part of.
        """
        self._budget = budget
        if self._track:
            from lsa.tracking.stream import Stream  # MLflow takes a second to import

            limit = budget.share
            share = None if limit is None else SENDING * limit / 2
            self._stream = Stream("watch", "" if self._track is True else str(self._track), share)
        if self._live:
            self._line = Line.where_seen()

    def blocks_are_due(self, step: int) -> bool:
        """Whether the norms of blocks are wanted at a step."""
        return self._last is None or step % self._every == 0

    def put(self, step: int, row: Mapping[str, float]) -> None:
        """Take the numbers of a step."""
        interval = self._interval(len(row))
        passed = self._last is None or step // interval > self._last // interval
        if passed or "probe_loss" in row:
            self._last = step
            named = {f"{PREFIX}{name}": value for name, value in row.items()}
            if self._stream is not None:
                self._stream.put(named, step)
            elif self._sink is not None:
                self._sink(named, step)
        if self._line is not None:
            self._line.show(step, row)

    @property
    def sends(self) -> bool:
        """Whether a thread sends numbers to MLflow."""
        return self._stream is not None

    def _interval(self, numbers: int) -> int:
        """Steps between those whose norms go out.

        Args:
            numbers: That go out then.
        """
        if self._stream is None:
            return self._log_every
        self._budget.add(self._stream.seconds - self._counted)
        self._counted = self._stream.seconds
        self._budget.costs("sending", numbers * self._stream.price)
        return self._budget.interval("sending", self._log_every, SENDING)

    def close(self, history: History, status: str) -> None:
        """Send the rest, with the history as a table and a figure."""
        if self._line is not None:
            self._line.close()
        if self._stream is None or not self._stream.is_open:
            return
        try:
            if history:
                history.frame().to_csv(self._stream.file("watch/history.csv"), index=False)
                from lsa.figures.watch import draw

                figure = draw(history.column, "Watched training", history.column("alarm")[0])
                figure.savefig(self._stream.file("watch/watch.png"))
        finally:
            self._stream.close(status)

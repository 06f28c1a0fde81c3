"""Where the numbers of a watch go: a run of MLflow, another's function, a line on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lsa.watching.history import History
from lsa.watching.live import Line

Sink = Callable[[Mapping[str, float], int], None]
PREFIX = "watch/"


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
        self._first = True

    def open(self) -> None:
        """Find the run, or make one, and start to send."""
        if self._track:
            from lsa.tracking.stream import Stream  # MLflow takes a second to import

            self._stream = Stream("watch", "" if self._track is True else str(self._track))
        if self._live:
            self._line = Line.where_seen()

    def blocks_are_due(self, step: int) -> bool:
        """Whether the norms of blocks are wanted at a step."""
        return self._first or step % self._every == 0

    def put(self, step: int, row: Mapping[str, float]) -> None:
        """Take the numbers of a step."""
        wanted = self._first or step % self._log_every == 0 or "probe_loss" in row
        self._first = False
        if wanted:
            named = {f"{PREFIX}{name}": value for name, value in row.items()}
            if self._stream is not None:
                self._stream.put(named, step)
            elif self._sink is not None:
                self._sink(named, step)
        if self._line is not None:
            self._line.show(step, row)

    def close(self, history: History, status: str) -> None:
        """Send the rest, with the history as a table and a figure."""
        if self._line is not None:
            self._line.close()
        if self._stream is None:
            return
        try:
            if history:
                history.frame().to_csv(self._stream.file("watch/history.csv"), index=False)
                from lsa.figures.watch import draw

                figure = draw(history.column, "Watched training", history.column("alarm")[0])
                figure.savefig(self._stream.file("watch/watch.png"))
        finally:
            self._stream.close(status)

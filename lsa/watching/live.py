"""The newest numbers of a training in one line of the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

SHOWN = {  # name → how the line writes it
    "loss": "loss {:.4g}",
    "gradient_norm": "|g| {:.3g}",
    "update_ratio": "|u|/|θ| {:.2g}",
    "critical_factor": "critical × {:.2g}",
    "threshold_ratio": "sharpness/threshold {:.2f}",
    "overhead": "watch {:.1%}",
}
PAUSE = 0.25  # seconds between two writings


class Line:
    """One line that is written over and over; what was measured last stays in it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=False)
        self._live.start()
        self._known: dict[str, float] = {}
        self._next = 0.0

    @classmethod
    def where_seen(cls) -> Line | None:
        """A line, if the error stream is a terminal."""
        return cls() if sys.stderr.isatty() else None

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        if "noise_scale_low" in row:  # a number and an upper end of earlier steps are none of these
            self._known.pop("noise_scale_high", None)
        self._known.update(row)
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PAUSE
        line = self._text(text(step, self._known), no_wrap=True, overflow="ellipsis")
        self._live.update(line, refresh=True)

    def close(self) -> None:
        """Leave the line as it is."""
        self._live.stop()


def text(step: int, row: Mapping[str, float]) -> str:
    """The line."""
    parts = [form.format(row[name]) for name, form in SHOWN.items() if name in row]
    low, high = row.get("noise_scale_low"), row.get("noise_scale_high")
    if low is not None:
        ends = f"> {low:.2g}" if high is None else f"{low:.2g} … {high:.2g}"
        parts.append(f"noise scale {ends}")
    return "  ".join([f"step {step}", *parts])

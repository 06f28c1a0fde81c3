"""One curve of a probe for several checkpoints or pairs in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lsa.plots.axes import axes

DECADES = 1e-7  # of the largest value, the smallest that a log axis shows
Points = tuple[Sequence[float], Sequence[float]]  # x, y


def overlay(title: str, x_name: str, y_name: str, lines: Mapping[str, Sequence[Points]]) -> Figure:
    """A colour per subject, a line per seed."""
    figure, plot = axes(title)
    for i, (subject, many) in enumerate(lines.items()):
        for j, (x, y) in enumerate(many):
            plot.plot(x, y, color=f"C{i}", linewidth=1.2, label=subject if j == 0 else None)
    points = [np.asarray(values, float) for many in lines.values() for values in many]
    across = np.concatenate([xy[0] for xy in points])
    heights = np.concatenate([xy[1] for xy in points])
    if across.min() > 0 and across.max() > 100 * across.min():
        plot.set_xscale("log")
    if _spans_decades(heights):
        plot.set_yscale("log")
        lowest = max(heights[heights > 0].min(), DECADES * heights.max())
        plot.set_ylim(lowest / 2, 2 * heights.max())
    plot.set_xlabel(x_name.replace("_", " "))
    plot.set_ylabel(y_name.replace("_", " "))
    plot.legend(frameon=False)
    return figure


def _spans_decades(values: np.ndarray) -> bool:
    """Whether values that are not negative need a log axis."""
    positive = values[values > 0]
    return len(positive) > 0 and values.min() >= 0 and values.max() > 100 * np.median(positive) / 2

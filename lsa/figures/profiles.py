"""Loss between two checkpoints, for every pair of optimizers: on a line and along a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lsa.figures import words
from lsa.figures.axes import fix_margins, make_logarithmic
from lsa.figures.overlay import Numbers, Points, draw_seeds

COLUMNS = 3
PANEL = (4.2, 3.2)  # inches
DECADE = 10  # of losses, from which on their axis is logarithmic
LINES = {  # colours that no optimizer has, told apart by their strokes as well
    "straight line": ("#777777", "-"),
    "straight line, units aligned": ("#882255", "--"),
    "minimum-energy path": ("#332288", "-."),
}


def profiles(
    pairs: Mapping[str, Mapping[str, Sequence[Points]]], bound: float | None = None
) -> Figure:
    """A panel per pair; a thin line per seed and a bold median of each kind of way.

    Args:
        pairs: Pair → kind of way, as `LINES` names them → (fractions of its length, train losses)
            of each seed.
        bound: ln C, which no minimum-energy path exceeds.
    """
    columns = min(COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    size = (PANEL[0] * columns, PANEL[1] * rows + 0.5)
    figure = Figure(figsize=size, dpi=110)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(pairs) :]:
        panel.remove()
    for panel, (pair, ways) in zip(panels.flat, pairs.items(), strict=False):
        for way, (colour, style) in LINES.items():
            draw_seeds(panel, ways.get(way, ()), colour, way, style)
        if bound is not None:
            panel.axhline(bound, color="black", linestyle="--", linewidth=0.8, label="ln C")
        panel.set_title(words.short(pair, 48), fontsize=10)
    heights = np.concatenate(
        [y for ways in pairs.values() for many in ways.values() for _, y in many]
    )
    if heights.min() > 0 and heights.max() > DECADE * heights.min():
        make_logarithmic(panels[0, 0], y=True)  # of all, since they share the axis
    for panel in panels[:, 0]:
        panel.set_ylabel("train loss")
    figure.supxlabel("share of the way from the first to the second", fontsize=10)
    handles = {
        text: handle
        for panel in panels.flat[: len(pairs)]
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=4, frameon=False)
    fix_margins(figure, left=0.95, right=0.2, bottom=0.6, top=0.75, between=0.3)
    return figure


def inside(x: Numbers, y: Numbers) -> Points:
    """The part of a line between the two checkpoints, 0 ≤ x ≤ 1, where the loss is finite."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    kept = (a >= 0) & (a <= 1) & np.isfinite(b)
    return a[kept], b[kept]

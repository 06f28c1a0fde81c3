"""One curve of a probe for several checkpoints or pairs in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lsa.figures import words
from lsa.figures.axes import COLOURS, MARKERS, axes, fix_margins, label, make_logarithmic, name_x

DECADES = 1e-7  # of the largest value, the smallest that a log axis shows
# Entries of a legend that a panel has room for. More stand beside it, in columns of so many.
FEW, ROWS = 12, 20
LETTER, LINE = 0.075, 0.6  # inches of a letter of it there, and of a line with its margins
Numbers = Sequence[float] | np.ndarray
Points = tuple[Numbers, Numbers]  # x, y


def overlay(
    title: str,
    x_name: str,
    y_name: str,
    lines: Mapping[str, Sequence[Points]],
    levels: Mapping[str, tuple[float, str]] | None = None,
) -> Figure:
    """A colour and a marker per subject: a thin line per seed, a bold one through their medians.

    Args:
        title: Of the figure.
        x_name: Of the horizontal axis.
        y_name: Of the vertical axis.
        lines: Subject → the x and y of each seed.
        levels: Subject → a height and what it is, dashed in the subject's colour.
    """
    figure, plot = axes(title, layout=None)
    draw_lines(plot, lines)
    draw_levels(plot, list(lines), levels or {})
    points = [np.asarray(values, float) for many in lines.values() for values in many]
    scale_axes(plot, points)
    name_x(plot, x_name)
    plot.set_ylabel(label(y_name))
    beside = draw_legend(figure, plot)
    fix_margins(figure, left=0.95, right=0.2 + beside, bottom=0.6, top=0.4 if title else 0.15)
    return figure


def draw_legend(figure: Figure, plot: Any, **options: Any) -> float:
    """A legend in a panel, or at the right of all panels if it has more than `FEW` entries.

    Args:
        figure: It becomes wider by a legend at its right.
        plot: The panel whose lines the legend names.
        **options: Of a legend in the panel.

    Returns:
        Width of the legend at the right in inches; 0 if there is none.
    """
    handles, texts = plot.get_legend_handles_labels()
    if len(texts) <= FEW:
        plot.legend(**options)
        return 0.0
    columns = -(-len(texts) // ROWS)
    beside = columns * (LINE + LETTER * max(map(len, texts)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + beside, height)
    left = width / (width + beside)
    look = {"ncols": columns, "fontsize": 8, "borderaxespad": 0.5}
    figure.legend(handles, texts, loc="upper left", bbox_to_anchor=(left, 1), **look)
    return beside


def draw_lines(plot: Any, lines: Mapping[str, Sequence[Points]], style: str = "-") -> None:
    """Every subject's seeds and their median, in colours and markers of their own."""
    for i, (subject, many) in enumerate(lines.items()):
        draw_seeds(plot, many, colour(i), subject, style, marker=i)


def colour(i: int) -> str:
    """Colour of the subject with this index in the legend."""
    return COLOURS[i % len(COLOURS)]


def mark(i: int, points: int) -> dict[str, Any]:
    """The same subject's marker, about eight times along a line of so many points."""
    every = max(1, points // 8)
    start = (i * every // 3) % every  # beside the markers of the others
    return {"marker": shape(i), "markersize": 5, "markevery": (start, every)}


def shape(i: int) -> str:
    """Marker of the subject with this index: of one colour, each subject has another."""
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def draw_seeds(
    plot: Any,
    many: Sequence[Points],
    colour: str,
    text: str,
    style: str = "-",
    *,
    marker: int | None = None,
) -> None:
    """A thin line per seed and a bold one through their medians; of one seed, its line."""
    many = [(x, y) for x, y in many if len(x)]
    if len(many) > 1:
        segments = [np.column_stack(points) for points in many]
        look = {"colors": colour, "linewidths": 0.7, "alpha": 0.3, "linestyles": style}
        plot.add_collection(LineCollection(segments, **look))  # sooner drawn than many lines
    if many:
        x, y = _median(many)
        look = {} if marker is None else mark(marker, len(x))
        plot.plot(x, y, color=colour, linewidth=2, linestyle=style, label=words.short(text), **look)


def draw_levels(
    plot: Any, subjects: Sequence[str], levels: Mapping[str, tuple[float, str]]
) -> None:
    """Dashed lines in the subjects' colours, shifted so that two equal ones are both seen."""
    for i, subject in enumerate(subjects):
        if subject in levels:
            height, text = levels[subject]
            plot.axhline(
                height,
                color=colour(i),
                linestyle=(5 * i, (5, 5)),
                linewidth=1.2,
                label=words.short(text, 48),
            )


def scale_axes(plot: Any, points: Sequence[np.ndarray], *, ratios: bool = False) -> None:
    """Logarithmic axes where the points, each (2, n), span decades.

    Args:
        plot: The axes.
        points: What is drawn on them.
        ratios: Whether heights compare as ratios; a factor of 30 between them is then enough.
    """
    across = np.concatenate([xy[0] for xy in points])
    heights = np.concatenate([xy[1] for xy in points])
    heights = heights[np.isfinite(heights)]
    if across.min() > 0 and across.max() > 30 * across.min():
        make_logarithmic(plot, x=True)
    far = ratios and len(heights) and 0 < 30 * heights.min() < heights.max()
    if far or (len(heights) and _spans_decades(heights)):
        make_logarithmic(plot, y=True)
        lowest = max(heights[heights > 0].min(), DECADES * heights.max())
        plot.set_ylim(lowest / 2, 2 * heights.max())


def _median(many: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """The median over the seeds, at every x that all of them reach."""
    arrays = [(np.asarray(x, float), np.asarray(y, float)) for x, y in many]
    low, high = max(x.min() for x, _ in arrays), min(x.max() for x, _ in arrays)
    grid = np.unique(np.concatenate([x for x, _ in arrays]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.median([np.interp(grid, x, y) for x, y in arrays], axis=0)


def _spans_decades(values: np.ndarray) -> bool:
    """Whether values that are not negative need a log axis."""
    positive = values[values > 0]
    return len(positive) > 0 and values.min() >= 0 and values.max() > 100 * np.median(positive) / 2

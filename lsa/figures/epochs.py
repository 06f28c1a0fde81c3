"""One quantity during training: against the epoch, and against the train loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import axes, fix_margins, make_logarithmic
from lsa.figures.overlay import (
    Points,
    colour,
    draw_legend,
    draw_levels,
    draw_lines,
    scale_axes,
    shape,
)


def epochs(
    title: str,
    y_name: str,
    by_epoch: Mapping[str, Sequence[Points]],
    by_loss: Mapping[str, Sequence[Points]],
    thresholds: Mapping[str, tuple[float, str]],
) -> Figure:
    """A colour and a marker per optimizer, a thin line per seed and a bold median.

    Args:
        title: Of the figure.
        y_name: The quantity.
        by_epoch: Optimizer → (epochs, values) of each seed.
        by_loss: Optimizer → (train losses, values) of each seed.
        thresholds: Optimizer → the value above which its training is unstable and its formula,
            dashed in the optimizer's colour.
    """
    figure, (left, right) = axes(title, columns=2, layout=None)
    draw_lines(left, by_epoch)
    draw_levels(left, list(by_epoch), thresholds)
    shown = [np.asarray(values, float) for many in by_epoch.values() for values in many]
    heights = [np.array([[xy[0].min()], [level]]) for xy in shown[:1] for level, _ in
               thresholds.values()]  # fmt: skip
    scale_axes(left, [*shown, *heights], ratios=True)
    left.set_xscale("linear")
    left.set_xlabel("epoch")
    left.set_ylabel(y_name)
    beside = draw_legend(figure, left, fontsize=9)
    for i, many in enumerate(by_loss.values()):
        for losses, values in many:  # a loss may rise, so there is no median against it
            right.plot(losses, values, color=colour(i), linewidth=1, alpha=0.6)
            last = {"marker": shape(i), "color": colour(i), "markersize": 6}
            right.plot(losses[-1:], values[-1:], **last)
    make_logarithmic(right, x=True, y=left.get_yscale() == "log")
    right.set_ylim(left.get_ylim())
    right.invert_xaxis()
    right.set_xlabel("train loss (training goes to the right; marks: the last epoch)")
    fix_margins(figure, left=0.95, right=0.2 + beside, bottom=0.6, top=0.45 if title else 0.15)
    return figure

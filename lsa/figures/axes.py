"""What the figures share: their size and style, and how a quantity is written on an axis."""

from __future__ import annotations

import re
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator

from lsa.figures import words
from lsa.probe import Metric

# Told apart by people of every colour vision (Okabe & Ito 2008), and by shape without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
matplotlib.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "axes.prop_cycle": cycler(color=COLOURS),
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,  # lines may pass behind it
    }
)

PANEL = (6.4, 4)  # inches
LABEL = (0.72, 0.34)  # inches from an axis to the label at its left, and to that below it
A, B = COLOURS[:2]  # first and second of two things compared


def axes(
    title: str, columns: int = 1, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Figure, Any]:
    """A figure with a panel, or several side by side; `layout=None` for `fix_margins`."""
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1]), layout=layout, dpi=120)
    panels = figure.subplots(1, columns)
    if columns == 1:
        panels.set_title(title)
    else:
        figure.suptitle(title)
    return figure, panels


def fix_margins(
    figure: Figure, left: float, right: float, bottom: float, top: float, between: float = 0.9
) -> None:
    """Give a figure margins, and its labels places, in inches, that do not depend on its text.

    Matplotlib's layouts measure every text twice more than drawing it does, which is half the time
    of a report whose figures are new.

    Args:
        figure: Without a layout, its panels in equal columns and rows.
        left: From the figure's edge to the axes.
        right: The same on the right.
        bottom: The same below.
        top: The same above.
        between: From one panel to the next, to the right.
    """
    width, height = figure.get_size_inches()
    grid: Any = figure.axes[0].get_gridspec()
    panel = (width - left - right - between * (grid.ncols - 1)) / grid.ncols
    figure.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - top / height, between / panel
    )
    for axes in figure.axes:
        box = axes.get_position()
        axes.xaxis.set_label_coords(0.5, -LABEL[1] / (box.height * height))
        axes.yaxis.set_label_coords(-LABEL[0] / (box.width * width), 0.5)
        axes.set_title(axes.get_title(), y=1.0, fontsize=axes.title.get_fontsize())


def make_logarithmic(plot: Any, x: bool = False, y: bool = False) -> None:
    """Scales that take half of what drawing matplotlib's own does.

    Their labels are plain text instead of formulas to be typeset, and where they span decades, only
    2 and 5 have ticks between two powers of ten.
    """
    for wanted, axis, scale in ((x, plot.xaxis, plot.set_xscale), (y, plot.yaxis, plot.set_yscale)):
        if wanted:
            scale("log")
            axis.set_major_formatter(Decades())
            axis.set_minor_formatter(Decades(labelOnlyBase=False))
            axis.set_minor_locator(_Between())


class _Between(LogLocator):
    """Ticks between powers of ten."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Positions of the ticks: 2 and 5, or 2, 3, …, 9 if these are too few."""
        self.set_params(subs=(2, 5) if vmax > 30 * vmin else "auto")
        return super().tick_values(vmin, vmax)


class Decades(LogFormatterSciNotation):
    """Numbers in plain text, large and small ones by powers of ten: 0.2, 30, 10⁻³, 2×10⁴."""

    POWER = re.compile(r"10\^\{(.*?)\}")
    RAISED = str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick; empty where it has none."""
        formula = super().__call__(x, pos)
        if formula and 0.0099 < x < 999:
            return f"{x:.3g}"
        text = formula.replace(r"$\mathdefault{", "").removesuffix("}$").replace(r"\times", "×")
        return self.POWER.sub(lambda match: "10" + match[1].translate(self.RAISED), text)


def label(name: str, unit: str = "") -> str:
    """Quantity and unit, as an axis names them."""
    text = words.quantity(name)
    return f"{text} ({unit})" if unit else text


def name_x(plot: Any, name: str, unit: str = "") -> None:
    """Label the horizontal axis; an axis that counts gets whole numbers as ticks."""
    text = words.axis(name)
    plot.set_xlabel(f"{text} ({unit})" if unit else text)
    if name in words.COUNTS and plot.get_xscale() == "linear":
        plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def written(metric: Metric, source: str = "data") -> str:
    """Value ± two of its standard errors from a source, if it has one."""
    error = metric.errors.get(source)
    return f"{metric.value:.3g}" + ("" if error is None else f" ± {2 * error:.2g}")

"""What the figures share: their size and style, and how a quantity is written on an axis."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lsa.probe import Metric

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

PANEL = (6.4, 4)  # inches
A, B = "tab:blue", "tab:orange"  # first and second of two things compared


def axes(title: str, columns: int = 1) -> tuple[Figure, Any]:
    """A figure with one panel, or an array of panels side by side."""
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1]), layout="constrained", dpi=120)
    panels = figure.subplots(1, columns)
    if columns == 1:
        panels.set_title(title)
    else:
        figure.suptitle(title)
    return figure, panels


def label(name: str, unit: str) -> str:
    """Quantity and unit, as an axis names them."""
    return f"{name.replace('_', ' ')} ({unit})" if unit else name.replace("_", " ")


def written(metric: Metric, source: str = "data") -> str:
    """Value ± two of its standard errors from a source, if it has one."""
    error = metric.errors.get(source)
    return f"{metric.value:.3g}" + ("" if error is None else f" ± {2 * error:.2g}")

"""Accuracy reached in random subspaces against their dimension, and where it is enough."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes
from lsa.probe import Result


def draw(result: Result, title: str) -> Figure:
    """Every training, the means ±2 standard errors, their monotone fit, both accuracies wanted."""
    figure, plot = axes(f"{title}: accuracy in random subspaces")
    d, accuracies = result.arrays["dimensions"], result.arrays["accuracies"]
    runs = len(accuracies)
    flat = accuracies.ravel()
    plot.plot(np.tile(d, runs), flat, "o", color=A, alpha=0.3, mew=0, label="one subspace")
    if runs > 1:
        mean, error = accuracies.mean(0), 2 * accuracies.std(0, ddof=1) / math.sqrt(runs)
        plot.errorbar(d, mean, error, fmt="_", color=A, capsize=3, label="mean ± 2 s.e.")
    if len(d) > 1:
        plot.plot(d, result.arrays["monotone_fit"], color=A, linewidth=1, label="monotone fit")
    _interval(plot, result, d)
    _levels(plot, result)
    plot.set_xscale("log")
    plot.set_xlabel(f"dimension d of the subspace, of {result.metrics['parameters'].value:,.0f}")
    plot.set_ylabel("validation accuracy")
    plot.margins(x=0.08, y=0.08)
    plot.set_ylim(bottom=0)  # after the margin
    plot.legend(loc="lower right")
    return figure


def _interval(plot: Any, result: Result, d: np.ndarray) -> None:
    """d90 as a line in the band of its interval, which may be open to the right."""
    if "d90" not in result.metrics:
        return
    value, low, high = (result.metrics[name].value for name in ("d90", "d90_low", "d90_high"))
    if not math.isfinite(value):
        return
    said = f"d90 = {value:.0f}"
    if math.isfinite(low):
        above = f"{high:.0f}" if math.isfinite(high) else "∞"
        said += f" (95 %: {low:.0f} … {above})"
        plot.axvspan(low, min(high, float(d[-1])), color=B, alpha=0.15, linewidth=0)
    plot.axvline(value, color=B, label=said)


def _levels(plot: Any, result: Result) -> None:
    """The baseline and the share of it that counts, with their numbers."""
    name = "global" if "baseline_global" in result.metrics else "local"
    baseline = result.metrics[f"baseline_{name}"].value
    threshold = result.metrics["threshold"].value
    lines = [(baseline, f"{name} baseline {baseline:.3f}", 4, "bottom")]
    if threshold < baseline:
        share = f"{threshold / baseline:.3g} × baseline = {threshold:.3f}"
        lines.append((threshold, share, -4, "top"))
    for level, text, offset, side in lines:
        plot.axhline(level, color="black", linestyle="--", linewidth=0.8)
        plot.annotate(
            text,
            (0.01, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, offset),
            textcoords="offset points",
            va=side,
            fontsize=9,
        )

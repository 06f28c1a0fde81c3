"""The loss along the minimum-energy path and along the straight line."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes
from lsa.probe import Result


def draw(result: Result, title: str) -> Figure:
    """Profiles of path and line, the pivots, ln C, and the path's maximum ±2 standard errors."""
    figure, plot = axes(f"{title}: minimum-energy path")
    alphas, energies = result.arrays["alphas"], result.arrays["energies"]
    line, test = result.curves["linear_loss"], result.curves["test_loss"]
    pivots = _pivots(result)
    plot.plot(line.x, line.y, color="#777777", label="straight line, train")
    plot.plot(test.x, test.y, color=B, linestyle=":", label="path, test")
    plot.plot(alphas, energies, color=A, label="path, train")
    plot.plot(alphas[pivots], energies[pivots], "o", color=A, markersize=4, label="pivots")
    plot.set_yscale("log")  # minima near 10⁻³ and ln C share the axis
    if "log_classes" in result.metrics:
        _mark_bound(plot, result.metrics["log_classes"].value)
    _mark_top(plot, result, alphas[energies.argmax()])
    samples = int(result.metrics["n_samples"].value)
    plot.set_xlabel(
        f"fraction of the length from A to B; ±2 standard errors over {samples} samples"
    )
    plot.set_ylabel("loss")
    plot.margins(y=0.12)
    figure.legend(frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    return figure


def _pivots(result: Result) -> np.ndarray:
    """Indices of the pivots among the dense points."""
    segments = sum(name.startswith("node_") for name in result.arrays) - 1
    last = len(result.arrays["alphas"]) - 1
    return np.arange(0, last + 1, last // segments)


def _mark_bound(plot: Any, height: float) -> None:
    plot.axhline(height, color="black", linestyle="--", linewidth=0.8)
    text = f"ln C = {height:.3g}"
    plot.annotate(text, (0, height), xytext=(0, 4), textcoords="offset points")


def _mark_top(plot: Any, result: Result, alpha: float) -> None:
    """The highest point of the path with its error bar."""
    metric = result.metrics["path_loss"]
    error = 2 * metric.errors.get("data", 0.0)
    plot.errorbar(alpha, metric.value, yerr=error, color="black", capsize=4, fmt="D", markersize=4)
    plot.annotate(
        f"{metric.value:.3g} ± {error:.2g}",
        (alpha, metric.value + error),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
    )

"""The ends of the Hessian spectrum and its density, with what is known of their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import axes
from lsa.probe import Curve, Result


def draw(result: Result, title: str) -> Figure:
    """Eigenvalues at both ends, and beside them the density where it was measured."""
    if "density" not in result.curves:
        figure, panel = axes(f"{title}: ends of the Hessian spectrum")
        _ends(panel, result)
        return figure
    figure, panels = axes(f"{title}: Hessian spectrum", 2)
    _ends(panels[0], result)
    _density(panels[1], result)
    return figure


def _ends(panel: Any, result: Result) -> None:
    """Bars of the eigenvalues, ±2 standard errors at the outermost."""
    curve = result.curves["eigenvalue"]
    positions = range(len(curve.x))
    colours = ["C0" if value >= 0 else "C1" for value in curve.y]
    panel.bar(positions, curve.y, color=colours, width=0.6)
    for name, position in (("lambda_max", 0), ("lambda_min", len(curve.x) - 1)):
        if name not in result.metrics:
            continue
        metric = result.metrics[name]
        error = 2 * metric.errors.get("data", 0.0)
        panel.errorbar(position, metric.value, yerr=error, color="black", capsize=4)
        panel.annotate(
            f"{metric.value:.3g} ± {error:.2g}",
            (position, max(metric.value, 0) + error),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
        )
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(list(positions), [f"λ{_subscript(int(i))}" for i in curve.x])
    panel.set_ylabel("eigenvalue (loss)")
    samples = int(result.metrics["n_samples"].value)
    panel.set_xlabel(f"index from either end; ±2 standard errors over {samples} samples")
    panel.margins(y=0.15)


def _density(panel: Any, result: Result) -> None:
    """Density on a log scale, its floor one eigenvalue of the whole spectrum."""
    curve: Curve = result.curves["density"]
    nodes = result.arrays["density_nodes"]
    scale = np.abs(nodes).max()
    x = curve.x * scale
    y, error = curve.y / scale, np.zeros_like(curve.y) if curve.error is None else curve.error
    spread = 2 * error / scale
    visible = y.max() * 1e-7
    panel.semilogy(x, np.maximum(y, visible), color="C0")
    low, high = np.maximum(y - spread, visible), np.maximum(y + spread, visible)
    panel.fill_between(x, low, high, alpha=0.25, label=f"±2 standard errors, {len(nodes)} probes")
    panel.axvline(0, color="black", linewidth=0.8)
    edge = result.metrics["bulk_edge"].value
    count = result.metrics["n_outliers"].value
    panel.axvline(edge, color="C4", linestyle="--", label=f"bulk edge; {count:g} outliers")
    trace = result.metrics["trace"]
    text = f"trace {trace.value:.4g}"
    if "probes" in trace.errors:
        text += f" ± {2 * trace.errors['probes']:.2g}"
    panel.plot([], [], " ", label=text)
    panel.set_xlim(1.1 * min(nodes.min(), -0.02 * scale), 1.05 * nodes.max())
    panel.set_xlabel("eigenvalue (loss)")
    panel.set_ylabel("density (1/loss)")
    panel.legend()


def _subscript(index: int) -> str:
    return str(index).translate(str.maketrans("0123456789-", "₀₁₂₃₄₅₆₇₈₉₋"))

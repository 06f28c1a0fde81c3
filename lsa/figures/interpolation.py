"""Loss and error on the line through two checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes
from lsa.probe import Curve, Result

COLOURS = {"train": A, "test": B}
DECADES = 2  # of losses, from which on their axis is logarithmic


def draw(result: Result, title: str) -> Figure:
    """Loss and, for a classifier, error against α; dashed after aligning the units."""
    kinds = [kind for kind in ("loss", "error") if f"train_{kind}" in result.curves]
    figure, panels = axes(f"{title}: the line through both", columns=len(kinds))
    for kind, plot in zip(kinds, np.atleast_1d(panels), strict=True):
        _panel(plot, kind, result)
    return figure


def _panel(plot: Any, kind: str, result: Result) -> None:
    scale = 100 if kind == "error" else 1
    for name, curve in result.curves.items():
        split, quantity, *aligned = name.split("_")
        if quantity == kind:
            _curve(plot, curve, scale, name.replace("_", " "), COLOURS[split], bool(aligned))
    low, high = _range(result)
    if kind == "loss" and high > 10**DECADES * low:
        plot.set_yscale("log")
        plot.set_ylim(bottom=low / 2)
    else:
        plot.set_ylim(bottom=0)
    for end in (0, 1):
        plot.axvline(end, color="grey", linewidth=0.8, zorder=0)
    plot.set_xlabel("alpha (0: A, 1: B); ±2 standard errors")
    plot.set_ylabel("error (%)" if kind == "error" else "loss")
    plot.set_title(_barriers(kind, scale, result), fontsize=9)
    plot.legend()


def _curve(plot: Any, curve: Curve, scale: float, name: str, colour: str, aligned: bool) -> None:
    # A curve that is not finite somewhere has a gap there.
    x, y = curve.x, np.where(np.isfinite(curve.y), scale * curve.y, np.nan)
    plot.plot(x, y, color=colour, linestyle="--" if aligned else "-", label=name)
    if curve.error is not None:
        error = 2 * scale * curve.error
        # A logarithmic axis would leave a hole where the band reaches below zero.
        low = np.maximum(y - error, 1e-3 * y)
        plot.fill_between(x, low, y + error, color=colour, alpha=0.2, linewidth=0)


def _range(result: Result) -> tuple[float, float]:
    """Smallest and largest loss that a logarithmic axis can show."""
    values = np.concatenate([c.y for name, c in result.curves.items() if "loss" in name])
    shown = values[np.isfinite(values) & (values > 0)]
    return (shown.min(), shown.max()) if len(shown) else (0.0, 0.0)


def _barriers(kind: str, scale: float, result: Result) -> str:
    """Train barriers with ±2 standard errors."""
    name, unit = ("barrier", "") if kind == "loss" else ("barrier_train_error", " %")
    said = []
    for suffix in ("", "_aligned"):
        metric = result.metrics.get(name + suffix)
        if metric:
            error = 2 * scale * metric.errors.get("data", 0.0)
            value = f"{scale * metric.value:.3g} ± {error:.2g}{unit}"
            said.append(f"{suffix[1:]} {value}".strip())
    return f"train {kind} barrier {', '.join(said)}"

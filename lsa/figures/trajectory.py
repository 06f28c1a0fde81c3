"""Numbers against the epoch, along one training."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import A, axes, label
from lsa.probe import Curve, Metric, Result

SHARPNESS = ("lambda_max", "lambda_h")  # λ_max of the raw Hessian, to which a threshold belongs
LIMITS = {"sharpness": "stability_threshold"}  # a curve → the curve that is its own threshold
FAR = 3  # times the largest value: a threshold further up would flatten the curve


def draw(result: Result, title: str) -> Figure:
    """One panel per curve, with ±2 standard errors; the metrics are thresholds of λ_max."""
    shown = {name: c for name, c in result.curves.items() if name not in LIMITS.values()}
    figure, panels = axes(title, len(shown))
    for panel, (name, curve) in zip(np.atleast_1d(panels), shown.items(), strict=True):
        panel.plot(curve.x, curve.y, "o-", color=A, markersize=4, label=label(name, ""))
        if curve.error is not None:
            low, high = curve.y - 2 * curve.error, curve.y + 2 * curve.error
            panel.fill_between(curve.x, low, high, color=A, alpha=0.2, label="±2 standard errors")
        if name in SHARPNESS:
            for formula, threshold in result.metrics.items():
                _threshold(panel, curve, formula, threshold)
        if limit := result.curves.get(LIMITS.get(name, "")):
            panel.plot(limit.x, limit.y, "k--", linewidth=1, label=label("stability_threshold", ""))
            panel.set_yscale("log")  # the two may be orders apart
        panel.set_xlabel("epoch (0: initial weights)")
        panel.set_ylabel(label(name, curve.y_unit))
        panel.legend()
    return figure


def _threshold(panel: Any, curve: Curve, formula: str, threshold: Metric) -> None:
    """A dashed line where the full-batch optimizer would become unstable, or its value in words."""
    text = f"full-batch stability: {formula} = {threshold.value:.4g}"
    if threshold.value <= FAR * np.nanmax(curve.y):
        panel.axhline(threshold.value, color="black", linestyle="--", linewidth=1, label=text)
    else:
        panel.plot([], [], " ", label=f"{text} (above)")

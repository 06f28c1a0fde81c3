"""The curvature that the optimizer feels against its threshold, and the raw one beside it."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lsa.plots.axes import A, B, axes
from lsa.probe import Curve, Metric, Result


def draw(result: Result, title: str) -> Figure:
    """Top eigenvalues of P⁻¹H with the threshold, and those of H with other curvatures."""
    figure, (left, right) = axes(f"{title}: curvature as the optimizer feels it", 2)
    metrics = result.metrics
    if "sharpness" in metrics:
        _bars(left, result.curves["preconditioned_eigenvalue"], metrics["sharpness"], A)
    if limit := metrics.get("stability_threshold"):
        text = f"stability threshold {limit.value:.4g}"
        if ratio := metrics.get("threshold_ratio"):
            text += f"; sharpness is {_written(ratio)} of it"
        left.axhline(limit.value, color="black", linestyle="--", linewidth=1, label=text)
        left.legend(frameon=False)
    left.set_ylabel("eigenvalue of P⁻¹H (1/η)")
    left.set_title("preconditioned" if "sharpness" in metrics else "no preconditioner yet")

    _bars(right, result.curves["raw_eigenvalue"], metrics["lambda_max_raw"], B)
    for name, style in (("batch_sharpness", "-."), ("update_curvature", ":")):
        if name in metrics:
            text = f"{name.replace('_', ' ')} {_written(metrics[name])}"
            right.axhline(metrics[name].value, color="black", linestyle=style, label=text)
    right.set_ylabel("eigenvalue of H (loss)")
    right.set_title("raw")
    right.legend(frameon=False)
    samples = f"±2 standard errors over {metrics['n_samples'].value:g} samples"
    for panel in (left, right):
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xlabel(f"index; {samples}")
        panel.margins(y=0.2)
    return figure


def _bars(panel: Any, curve: Curve, top: Metric, colour: str) -> None:
    panel.bar(curve.x, curve.y, color=colour, width=0.6)
    panel.errorbar(1, top.value, yerr=2 * top.errors.get("data", 0.0), color="black", capsize=4)
    panel.set_xticks(curve.x)


def _written(metric: Metric) -> str:
    error = metric.errors.get("data")
    return f"{metric.value:.3g}" + ("" if error is None else f" ± {2 * error:.2g}")

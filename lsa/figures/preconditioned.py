"""The curvature that the optimizer feels against its threshold, and the raw one beside it."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes, label, written
from lsa.probe import Curve, Metric, Result

FAR = 5  # times the sharpness: a threshold further up would flatten the bars


def draw(result: Result, title: str) -> Figure:
    """Top eigenvalues of P⁻¹H with the threshold, and those of H with other curvatures."""
    figure, (left, right) = axes(f"{title}: curvature as the optimizer feels it", 2)
    metrics = result.metrics
    if "sharpness" in metrics:
        _bars(left, result.curves["preconditioned_eigenvalue"], metrics["sharpness"], A)
    if limit := metrics.get("stability_threshold"):
        _threshold(left, limit, metrics.get("threshold_ratio"))
    unit = limit.unit if limit else "1/η"
    left.set_ylabel("eigenvalue of P⁻¹H" + (f" ({unit})" if unit else ""))
    left.set_title("preconditioned" if "sharpness" in metrics else "no preconditioner yet")

    _bars(right, result.curves["raw_eigenvalue"], metrics["lambda_max_raw"], B)
    for name, style in (("batch_sharpness", "-."), ("update_curvature", ":")):
        if name in metrics:
            text = f"{label(name, '')} {written(metrics[name])}"
            right.axhline(metrics[name].value, color="k", linestyle=style, linewidth=1, label=text)
    right.set_ylabel("eigenvalue of H (loss)")
    right.set_title("raw")
    right.legend()
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


def _threshold(panel: Any, limit: Metric, ratio: Metric | None) -> None:
    """A dashed line, or its value in words where it would flatten the bars."""
    above = bool(ratio and FAR * ratio.value < 1)
    text = f"stability threshold {limit.value:.5g}{' (above)' if above else ''}"
    if ratio:
        text += f"; sharpness is {written(ratio)} of it"
    if above:
        panel.plot([], [], " ", label=text)
    else:
        panel.axhline(limit.value, color="black", linestyle="--", linewidth=1, label=text)
    panel.legend()

"""Curvature and gradient noise of every layer, side by side."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes, written
from lsa.probe import Curve, Result

ROW = 0.25  # inches that the name of a block needs


def draw(result: Result, title: str) -> Figure:
    """Ends of the blocks' spectra, their traces, and their shares of the gradient noise."""
    figure, panels = axes(f"{title}: curvature and noise of each block", 3)
    names, metrics = result.arrays["blocks.names"], result.metrics
    figure.set_size_inches(14, max(4, 1.5 + ROW * len(names)))
    ends, traces, noise = panels
    _bars(ends, result.curves["lambda_max_of_block"], A)
    if lowest := result.curves.get("lambda_min_of_block"):
        _bars(ends, lowest, "C1")
    network, share = metrics["lambda_max"], metrics["block_share"]
    ends.axvline(network.value, color="black", linestyle="--", linewidth=1)
    ends.set_title(f"whole {written(network)} (dashed); sharpest block {written(share)} of it")
    # In words as well, because next to λ_max a λ_min is often too short to be seen.
    red = f", and λ_min in red, lowest {lowest.y.min():.2g}" if lowest else ""
    ends.set_xlabel(f"λ_max{red} (loss)")
    ends.set_ylabel("block")
    _bars(traces, result.curves["trace_of_block"], A)
    traces.set_title(f"sum {written(metrics['trace'], 'probes')}")
    traces.set_xlabel("trace (loss)")
    if shares := result.curves.get("noise_share_of_block"):
        _bars(noise, shares, B)
    noise.set_title(f"all of it: tr C = {written(metrics['trace_c'])} (loss²)")
    noise.set_xlabel("share of the gradient noise")
    for panel in panels:
        panel.title.set_size(10)
        panel.axvline(0, color="black", linewidth=0.5)
        panel.set_yticks(range(1, len(names) + 1), names if panel is ends else [])
        panel.set_ylim(len(names) + 0.6, 0.4)  # the first layer on top
    text = "±2 standard errors over the samples, of traces over the random vectors"
    figure.supxlabel(text, fontsize=10)
    return figure


def _bars(panel: Any, curve: Curve, colour: str) -> None:
    errors = None if curve.error is None else 2 * curve.error
    panel.barh(curve.x, curve.y, 0.6, xerr=errors, color=colour, capsize=3)

"""Curvature and gradient noise of every layer, side by side."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lsa.plots.axes import A, B, axes
from lsa.probe import Curve, Result

ROW = 0.25  # inches that the name of a block needs


def draw(result: Result, title: str) -> Figure:
    """Ends of the blocks' spectra, their traces, and their shares of the gradient noise."""
    figure, panels = axes(f"{title}: curvature and noise of each block", 3)
    names = result.arrays["blocks.names"]
    figure.set_size_inches(14, max(4, 1.5 + ROW * len(names)))
    ends, traces, noise = panels
    _bars(ends, result.curves["lambda_max_of_block"], A)
    if lowest := result.curves.get("lambda_min_of_block"):
        _bars(ends, lowest, "tab:red")
    whole, share = (result.metrics[name].value for name in ("lambda_max", "block_share"))
    ends.axvline(whole, color="black", linestyle="--", linewidth=1)
    ends.set_title(f"dashed: λ_max of the whole, {whole:.3g}; sharpest block {share:.0%}")
    ends.set_xlabel("λ_max, and λ_min in red (loss)")
    _bars(traces, result.curves["trace_of_block"], A)
    trace = result.metrics["trace"]
    traces.set_title(f"sum {trace.value:.3g} ± {2 * trace.errors['probes']:.2g}")
    traces.set_xlabel("trace (loss)")
    if shares := result.curves.get("noise_share_of_block"):
        _bars(noise, shares, B)
    noise.set_title(f"all of it: tr C = {result.metrics['trace_c'].value:.3g}")
    noise.set_xlabel("share of the gradient noise")
    for panel in panels:
        panel.title.set_size(10)
        panel.axvline(0, color="black", linewidth=0.5)
        panel.set_yticks(range(1, len(names) + 1), names if panel is ends else [])
        panel.set_ylim(len(names) + 0.6, 0.4)  # the first layer on top
    figure.supxlabel("bars: ±2 standard errors, of traces over the random vectors", fontsize=10)
    return figure


def _bars(panel: Any, curve: Curve, colour: str) -> None:
    errors = None if curve.error is None else 2 * curve.error
    panel.barh(curve.x, curve.y, 0.6, xerr=errors, color=colour, capsize=3)

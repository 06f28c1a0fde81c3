"""Curvature and gradient noise of every layer, side by side.

Where blocks repeat, as those of a transformer, by depth and kind of layer in place of a list.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes, written
from lsa.probe import Curve, Result

ROW = 0.25  # inches that the name of a block needs


def draw(result: Result, title: str) -> Figure:
    """Ends of the blocks' spectra, their traces, and their shares of the gradient noise."""
    names, metrics = result.arrays["blocks.names"], result.metrics
    if stack := stacked([str(name) for name in names]):
        return _heat_maps(result, title, stack)
    figure, panels = axes(f"{title}: curvature and noise of each block", 3)
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
    if total := metrics.get("trace_c"):
        noise.set_title(f"all of it: tr C = {written(total)} (loss²)")
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


# --- repeated blocks ------------------------------------------------------------------------------


class Stack(NamedTuple):
    """Blocks that repeat: by depth and kind, and the others."""

    depths: list[int]
    kinds: list[str]
    index: np.ndarray  # (depths, kinds): number of the block, −1: none
    others: list[int]


def stacked(names: list[str]) -> Stack | None:
    """How most blocks of a network repeat, if they do; from `layers.3.attention.query`."""
    parts = [_part(name) for name in names]
    stems = Counter(p[0] for p in parts if p)
    if not stems:
        return None
    stem, count = stems.most_common(1)[0]
    inside = [(i, p[1], p[2]) for i, p in enumerate(parts) if p and p[0] == stem]
    depths = sorted({depth for _, depth, _ in inside})
    kinds = list(dict.fromkeys(kind for _, _, kind in inside))
    if len(depths) < 2 or len(kinds) < 3 or 2 * count < len(names):
        return None
    index = np.full((len(depths), len(kinds)), -1)
    for i, depth, kind in inside:
        index[depths.index(depth), kinds.index(kind)] = i
    members = {i for i, _, _ in inside}
    return Stack(depths, kinds, index, [i for i in range(len(names)) if i not in members])


def _part(name: str) -> tuple[str, int, str] | None:
    """What stands before the first number of a name, the number, and what stands behind."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit()), None)
    if at is None or at + 1 == len(words):
        return None
    return ".".join(words[:at]), int(words[at]), ".".join(words[at + 1 :])


def _heat_maps(result: Result, title: str, stack: Stack) -> Figure:
    """λ_max, trace and noise share by depth and kind, in logarithmic colours."""
    names, metrics = result.arrays["blocks.names"], result.metrics
    figure, panels = axes(f"{title}: curvature and noise of each block", 3)
    rows, columns = stack.index.shape
    figure.set_size_inches(max(14, 6 + 0.62 * 3 * columns), max(4.5, 3.2 + 0.42 * rows))
    share = metrics["block_share"]
    summary = f"whole {written(metrics['lambda_max'])}; sharpest block {written(share)} of it"
    tables = [
        ("lambda_max_of_block", f"λ_max (loss)\n{summary}"),
        ("trace_of_block", f"trace (loss)\nsum {written(metrics['trace'], 'probes')}"),
        ("noise_share_of_block", "share of the gradient noise"),
    ]
    for panel, (key, text) in zip(panels, tables, strict=True):
        panel.set_title(text, size=10)
        panel.set_xticks(range(columns), stack.kinds, rotation=60, ha="right", size=8)
        panel.set_yticks(range(rows), stack.depths)
        if curve := result.curves.get(key):
            _heat(panel, np.asarray(curve.y), stack)
            others = [f"{names[i]} {curve.y[i]:.2g}" for i in stack.others]
            text = "outside: " + ", ".join(others) if others else ""
            panel.set_xlabel(textwrap.fill(text, 15 * columns), size=8)
    panels[0].set_ylabel("depth")
    return figure


def _heat(panel: Any, values: np.ndarray, stack: Stack) -> None:
    """Numbers in their colours; grey where there is no block, or none above zero."""
    table = np.where(stack.index >= 0, values[stack.index], np.nan)
    positive = np.where(table > 0, table, np.nan)
    panel.set_facecolor("#ddd")
    if not np.isfinite(positive).any():
        return
    low, high = np.nanmin(positive), np.nanmax(positive)
    norm = LogNorm(max(low, high / 1e6), high if high > low else 2 * high)
    panel.imshow(positive, norm=norm, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = value > 0 and norm(value) < 0.6
            panel.text(
                j, i, f"{value:.2g}", ha="center", va="center", size=7,
                color="white" if dark else "black",
            )  # fmt: skip

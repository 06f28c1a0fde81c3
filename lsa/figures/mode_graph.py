"""The passes between checkpoints as a matrix, beside the tree that they hang together by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lsa.probe import Result

ROW = 0.42  # inches of a checkpoint
DECADES = 1  # of losses, from which on their axis is logarithmic


def draw(result: Result, title: str) -> Figure:
    """Matrix and disconnectivity graph, their rows the checkpoints in the order of the tree.

    Above the diagonal the straight line's barrier, below it the path's. The graph (Becker & Karplus
    1997) begins at every checkpoint's loss; two branches meet at the lowest pass between them.
    """
    arrays = {name.partition(".")[2]: values for name, values in result.arrays.items()}
    n = len(arrays["nodes"])
    height = max(3.6, ROW * n + 1.8)
    figure = Figure(figsize=(height + 7.2, height), layout="constrained", dpi=110)
    matrix, tree = figure.subplots(1, 2, width_ratios=[height, 5.5])
    figure.suptitle(title)
    _matrix(figure, matrix, arrays)
    _tree(tree, arrays)
    return figure


def _matrix(figure: Figure, plot: Any, arrays: Mapping[str, np.ndarray]) -> None:
    order, names = arrays["order"], arrays["nodes"]
    n = len(order)
    line, path = (arrays[way][np.ix_(order, order)] for way in ("line", "path"))
    shown = np.where(np.triu(np.ones((n, n), bool), 1), line, path)
    np.fill_diagonal(shown, np.nan)
    finite = shown[np.isfinite(shown) & (shown > 0)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.1, 1.0)
    # A barrier of 0 has the colour of the smallest.
    scale = LogNorm(low, max(high, 1.001 * low), clip=True)
    image = plot.imshow(np.ma.masked_invalid(np.maximum(shown, low)), norm=scale, cmap="viridis")
    middle = np.sqrt(low * high)
    for (i, j), value in np.ndenumerate(shown):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            plot.text(
                j, i, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=_size(n)
            )
    labels = [str(names[i]) for i in order]
    plot.set_xticks(range(n), labels, rotation=40, ha="right")
    plot.set_yticks(range(n), labels)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    plot.set_title("barrier: above the diagonal straight line, below path", fontsize=10)
    figure.colorbar(image, ax=plot, label="loss above the higher end", shrink=0.8)


def _tree(plot: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """The disconnectivity graph, its merges with their losses ±2 standard errors."""
    order, minima, passes = arrays["order"], arrays["minima"], arrays["pass"]
    where = {int(node): float(row) for row, node in enumerate(order)}
    branch = {node: (row, float(minima[node])) for node, row in where.items()}  # its row and loss
    joined = {node: [node] for node in where}
    for edge in arrays["edges"].tolist():
        a, b = (joined[node] for node in edge)
        i, j = edge
        loss, error = passes[i, j], arrays["pass_error"][i, j]
        ends = [branch[group[0]] for group in (a, b)]
        rows = [row for row, _ in ends]
        for row, start in ends:
            plot.plot([start, loss], [row, row], color="C0")
        plot.plot([loss, loss], rows, color="C0")
        if np.isfinite(error):
            plot.errorbar(loss, np.mean(rows), xerr=2 * error, color="black", capsize=3, lw=1)
        text = f"{loss:.2g}"
        plot.annotate(
            text, (loss, np.mean(rows)), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
        group = a + b
        for node in group:
            joined[node] = group
        branch[group[0]] = (float(np.mean(rows)), float(loss))
    errors = 2 * np.nan_to_num(arrays["minima_error"][order])
    plot.errorbar(
        minima[order], range(len(order)), xerr=errors, fmt="o", color="C0", markersize=4,
        capsize=2, elinewidth=0.8,
    )  # fmt: skip
    plot.set_ylim(len(order) - 0.5, -0.5)
    plot.set_yticks(range(len(order)), [str(arrays["nodes"][i]) for i in order])
    losses = np.concatenate([minima, [passes[i, j] for i, j in arrays["edges"]]])
    shown = losses[np.isfinite(losses) & (losses > 0)]
    if len(shown) and shown.max() > 10**DECADES * shown.min():
        plot.set_xscale("log")
    plot.set_xlabel("train loss ±2 standard errors\n(dots: checkpoints, joints: lowest passes)")
    plot.set_title("disconnectivity graph of the minimum spanning tree", fontsize=10)


def _size(n: int) -> float:
    return 9 if n <= 8 else max(5.0, 72 / n)

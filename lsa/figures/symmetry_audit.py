"""By what factor each number moved when the weights changed and the function did not."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import PANEL
from lsa.probe import Result

CHANGES = {
    "rescaled_layers": ("C1", "o", "layers rescaled"),
    "rescaled_units": ("C4", "s", "units rescaled"),
    "permuted": ("C0", "D", "units renumbered"),
    "rotated": ("C2", "^", "heads turned"),
}


def draw(result: Result, title: str) -> Figure:
    """A row per number, a mark per change, on a logarithmic axis about 1."""
    names = [n for n in result.metrics if not _changed(n) and n != "n_samples"]
    figure = Figure(figsize=(PANEL[0] * 1.3, 1.6 + 0.4 * len(names)), layout="constrained", dpi=120)
    plot = figure.subplots()
    rows = np.arange(len(names))[::-1]
    drawn = False
    for k, (change, (colour, mark, text)) in enumerate(CHANGES.items()):
        changes = [
            (row + 0.15 * (1.5 - k), metric)
            for row, name in zip(rows, names, strict=True)
            if (metric := result.metrics.get(f"{name}_{change}")) and metric.value > 0
        ]
        if not changes:
            continue
        drawn = True
        y, values = [row for row, _ in changes], np.array([m.value for _, m in changes])
        errors = np.array([sum(e**2 for e in m.errors.values()) ** 0.5 for _, m in changes])
        # A log axis has no room below 0.
        spans = [np.minimum(2 * errors, 0.9 * values), 2 * errors]
        plot.errorbar(
            values, y, xerr=spans, fmt=mark, color=colour, markersize=5, capsize=2, label=text
        )
    plot.axvline(1, color="black", linewidth=0.8)
    plot.set_xscale("log")
    plot.set_yticks(rows, [name.replace("_", " ") for name in names])
    plot.grid(axis="y", color="#eee")
    plot.set_axisbelow(True)
    plot.set_title(f"{title}: the same function with other weights")
    if drawn:
        plot.set_xlabel("factor by which the number moved; ±2 standard errors")
        plot.legend(loc="upper left", bbox_to_anchor=(1, 1))
    else:
        plot.set_xlabel("this network has no symmetry that is known")
    return figure


def _changed(name: str) -> bool:
    return name.endswith(tuple(CHANGES))

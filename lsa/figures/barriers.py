"""Barriers between the optimizers, each pair once per kind of barrier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lsa.figures import words
from lsa.figures.axes import Decades

CELL = 1.1  # inches
LETTER = 0.09  # inches, a wide one
DECADES = 1e-3  # of the largest barrier, the smallest that has a colour of its own


def barriers(
    names: Sequence[str],
    upper: Mapping[tuple[str, str], float],
    lower: Mapping[tuple[str, str], float],
    kinds: tuple[str, str],
) -> Figure:
    """A heat map, optimizers × optimizers, with the numbers in the cells.

    Args:
        names: Of the optimizers, in order.
        upper: Pair in that order → barrier, for the cells above the diagonal.
        lower: The same pairs → another barrier, for the cells below it.
        kinds: What stands above and what below the diagonal.
    """
    n = len(names)
    table = np.full((n, n), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i < j:
                table[i, j] = upper.get((a, b), np.nan)
                table[j, i] = lower.get((a, b), np.nan)
    shown = [words.short(name) for name in names]
    side, longest = CELL * n, LETTER * max(map(len, shown))
    left, bottom = 0.3 + longest, 0.3 + 0.6 * longest  # where names stand askew
    width, height = left + side + 1.3, bottom + side + 0.6
    figure = Figure(figsize=(width, height), dpi=110)
    plot = figure.add_axes((left / width, bottom / height, side / width, side / height))
    at_right = (left + side + 0.2) / width, (bottom + 0.1 * side) / height
    beside = figure.add_axes((*at_right, 0.15 / width, 0.8 * side / height))
    largest = np.nanmax(np.where(np.isfinite(table), table, np.nan), initial=0.0) or 1.0
    scale = LogNorm(DECADES * largest, largest, clip=True)
    image = plot.imshow(np.where(table > 0, table, DECADES * largest), norm=scale, cmap="viridis")
    image.set_alpha(np.where(np.isnan(table), 0.0, 1.0))
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            # Dark letters on the bright end of the map, bright ones on the dark end.
            colour = "black" if value > 0.1 * largest else "white"
            plot.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour)
    plot.set_xticks(range(n), shown, rotation=30, ha="right")
    plot.set_yticks(range(n), shown)
    plot.spines[:].set_visible(False)
    plot.tick_params(length=0)
    plot.set_title(f"above: {kinds[0]}\nbelow: {kinds[1]}", fontsize=10)
    bar = figure.colorbar(image, cax=beside, label="barrier (loss)", format=Decades())
    bar.minorlocator = NullLocator()
    return figure

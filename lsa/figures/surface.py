"""The loss on a plane: contours and a relief, with the checkpoints that lie on or near it."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from lsa.figures.axes import PANEL, A
from lsa.probe import Result

LEVELS = 24
WIDE = 20.0  # ratio of highest to lowest loss from which the scale is logarithmic
COLOURS = matplotlib.colormaps["viridis"]
TITLES = {
    "random": "filter-normalised random plane",
    "hessian": "plane of the top and the bottom eigenvector",
    "checkpoints": "plane through three checkpoints",
    "trajectory": "principal plane of the training",
}


def draw(result: Result, title: str) -> Figure:
    """Contours on the left, the relief on the right; of a trajectory, its distances as well."""
    arrays = {k.partition(".")[2]: v for k, v in result.arrays.items() if k.startswith("surface.")}
    plane, is_trajectory = str(arrays["plane"]), str(arrays["plane"]) == "trajectory"
    columns = 3 if is_trajectory else 2
    figure = Figure(figsize=(PANEL[0] * columns, 5), layout="constrained", dpi=110)
    figure.suptitle(f"{title}: {TITLES[plane]}")
    loss, norm, levels = _scale(arrays["loss"])
    left = figure.add_subplot(1, columns, 1)
    x, y = np.meshgrid(arrays["x"], arrays["y"])
    painted = left.contourf(x, y, loss, levels, norm=norm, cmap=COLOURS)
    left.contour(x, y, loss, levels[::2], norm=norm, colors="white", linewidths=0.5, alpha=0.6)
    bar = figure.colorbar(painted, ax=left, label="loss", format="%.3g")
    bar.ax.minorticks_off()
    _marks(left, arrays, is_trajectory)
    left.set_xlabel(str(arrays["labels"][0]))
    left.set_ylabel(str(arrays["labels"][1]))
    if plane != "random":  # lengths in θ, so that distances are true
        left.set_aspect("equal")
    _relief(figure.add_subplot(1, columns, 2, projection="3d"), x, y, loss, norm, arrays)
    if is_trajectory:
        _distances(figure.add_subplot(1, columns, 3), result, arrays)
    return figure


def _scale(loss: np.ndarray) -> tuple[np.ma.MaskedArray, Normalize, np.ndarray]:
    """The losses, blank where not finite, their scale, and the levels of the contours."""
    shown = np.ma.masked_invalid(loss)
    if not shown.count():
        return shown, Normalize(0, 1), np.linspace(0, 1, LEVELS)
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high / low > WIDE:
        return shown, LogNorm(low, high), np.geomspace(low, high * (1 + 1e-9), LEVELS)
    high = max(high, low + 1e-12 * max(1.0, abs(low)))  # a constant surface has no levels
    return shown, Normalize(low, high), np.linspace(low, high, LEVELS)


def _marks(plot: Any, arrays: dict[str, np.ndarray], is_trajectory: bool) -> None:
    x, y = arrays["mark_x"], arrays["mark_y"]
    if is_trajectory:
        plot.plot(x, y, "-", color="white", linewidth=2.5)
        plot.plot(x, y, ".-", color="C1", linewidth=1.2)
    plot.plot(x, y, "o", color="C1", markeredgecolor="white", markersize=6, linestyle="none")
    middle = (arrays["x"][0] + arrays["x"][-1]) / 2
    for i in {0, len(x) - 1} if is_trajectory else range(len(x)):
        right = x[i] > middle
        text = f"{arrays['mark'][i]}: {arrays['mark_loss'][i]:.3g}"
        plot.annotate(
            text,
            (x[i], y[i]),
            (-6, -6) if right else (6, 6),  # at one height they would cover each other
            textcoords="offset points",
            horizontalalignment="right" if right else "left",
            verticalalignment="top" if right else "bottom",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
        )


def _relief(
    plot: Any,
    x: np.ndarray,
    y: np.ndarray,
    loss: np.ma.MaskedArray,
    norm: Normalize,
    arrays: dict[str, np.ndarray],
) -> None:
    """The surface as a relief whose height is its colour."""
    logarithmic = isinstance(norm, LogNorm)
    values = loss.filled(np.nan)
    height = np.log10(values) if logarithmic else values
    colours = COLOURS(norm(loss))
    plot.plot_surface(x, y, height, facecolors=colours, rstride=1, cstride=1, linewidth=0)
    own = arrays["mark_loss"]
    heights = np.log10(np.where(own > 0, own, np.nan)) if logarithmic else own
    style = ".-" if str(arrays["plane"]) == "trajectory" else "."
    plot.plot(arrays["mark_x"], arrays["mark_y"], heights, style, color="C1", zorder=5)
    plot.set_xlabel("x")
    plot.set_ylabel("y")
    plot.set_zlabel("log₁₀ loss" if logarithmic else "loss")
    plot.locator_params(nbins=5)
    plot.view_init(elev=35, azim=-60)


def _distances(plot: Any, result: Result, arrays: dict[str, np.ndarray]) -> None:
    """Distance of the training from the plane on which it is drawn."""
    epochs = [str(name).removeprefix("epoch ") for name in arrays["mark"][:-1]]
    within = np.hypot(arrays["mark_x"], arrays["mark_y"])
    at = np.arange(len(within))
    plot.plot(at, within, "o-", color=A, label="to the checkpoint, within the plane")
    plot.plot(at, arrays["mark_distance"], "s-", color="C1", label="out of the plane")
    plot.set_xticks(at, [*epochs, "last"])
    plot.set_xlabel("epoch")
    plot.set_ylabel("distance (length in θ)")
    value = {name: metric.value for name, metric in result.metrics.items()}
    share, walk = (value[f"{s}_x"] + value[f"{s}_y"] for s in ("explained", "random_walk"))
    plot.set_title(f"plane holds {share:.0%} of the variance; a random walk's {walk:.0%}")
    plot.legend()

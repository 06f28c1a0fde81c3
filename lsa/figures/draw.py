"""Figures, each drawn from a probe's `Result`: `lsa/figures/<probe>.py` where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from lsa.figures.axes import axes, label
from lsa.figures.barriers import barriers
from lsa.figures.epochs import epochs
from lsa.figures.overlay import overlay
from lsa.figures.profiles import inside, profiles
from lsa.probe import Curve, Result

__all__ = ["barriers", "epochs", "figures", "inside", "overlay", "png", "profiles"]


def figures(probe: str, result: Result, title: str) -> dict[str, Figure]:
    """File name → figure: the probe's own drawing, or its curves one by one."""
    own = f"lsa.figures.{probe}"
    if importlib.util.find_spec(own) and hasattr(module := importlib.import_module(own), "draw"):
        return {f"{probe}.png": module.draw(result, title)}
    return {
        f"{probe}_{name}.png": _curve(name, curve, f"{title}: {name}")
        for name, curve in result.curves.items()
    }


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    drawn, canvas = io.BytesIO(), FigureCanvasAgg(figure)
    canvas.draw()  # once, where `savefig` draws twice
    quick = {"compress_level": 3}  # of 9: half the time of the usual 6, and the same size
    imsave(drawn, canvas.buffer_rgba(), format="png", dpi=figure.dpi, pil_kwargs=quick)
    return drawn.getvalue()


def _curve(name: str, curve: Curve, title: str) -> Figure:
    figure, plot = axes(title)
    plot.plot(curve.x, curve.y, marker=".")
    if curve.error is not None:
        low, high = curve.y - 2 * curve.error, curve.y + 2 * curve.error
        plot.fill_between(curve.x, low, high, alpha=0.25, label="±2 standard errors")
        plot.legend(frameon=False)
    plot.set_xlabel(label(curve.x_name, curve.x_unit))
    plot.set_ylabel(label(name, curve.y_unit))
    return figure

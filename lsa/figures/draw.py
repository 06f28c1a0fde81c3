"""Figures, each drawn from a probe's `Result`: `lsa/figures/<probe>.py` where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lsa.figures.axes import axes, label, name_x
from lsa.figures.barriers import barriers
from lsa.figures.epochs import epochs
from lsa.figures.overlay import overlay
from lsa.figures.profiles import inside, profiles
from lsa.probe import Curve, Result

TONES = 96  # of lines, letters and their smooth edges; more are not told apart
__all__ = ["barriers", "epochs", "figures", "inside", "overlay", "pictures", "png", "profiles"]


def figures(probe: str, result: Result, title: str) -> dict[str, Figure]:
    """File name → figure: the probe's own drawing, or its curves one by one."""
    own = f"lsa.figures.{probe}"
    if importlib.util.find_spec(own) and hasattr(module := importlib.import_module(own), "draw"):
        return {f"{probe}.png": module.draw(result, title)}
    return {
        f"{probe}_{name}.png": _curve(name, curve, f"{title}: {name}")
        for name, curve in result.curves.items()
    }


def pictures(probe: str, result: Result, title: str) -> dict[str, bytes]:
    """File name → each of the figures as a PNG file."""
    return {path: png(drawn, None) for path, drawn in figures(probe, result, title).items()}


def png(figure: Figure, tones: int | None = TONES) -> bytes:
    """The figure as a PNG file; of few colours it has a third of the usual size."""
    drawn, canvas = io.BytesIO(), FigureCanvasAgg(figure)
    canvas.draw()  # once, where `savefig` draws twice
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    if tones:
        image = image.quantize(tones, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(drawn, format="png", optimize=tones is not None)
    return drawn.getvalue()


def _curve(name: str, curve: Curve, title: str) -> Figure:
    figure, plot = axes(title)
    plot.plot(curve.x, curve.y, marker=".")
    if curve.error is not None:
        low, high = curve.y - 2 * curve.error, curve.y + 2 * curve.error
        plot.fill_between(curve.x, low, high, alpha=0.25, label="±2 standard errors")
        plot.legend()
    name_x(plot, curve.x_name, curve.x_unit)
    plot.set_ylabel(label(name, curve.y_unit))
    return figure

"""Figures, each drawn from a probe's `Result`."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsa.probe import Curve, Result

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})


def figures(probe: str, result: Result, title: str) -> dict[str, Figure]:
    """File name → figure: the probe's own drawing, or its curves one by one."""
    if probe in DRAWINGS:
        return {f"{probe}.png": DRAWINGS[probe](result, title)}
    return {
        f"{probe}_{name}.png": _curve(name, curve, f"{title}: {name}")
        for name, curve in result.curves.items()
    }


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _label(name: str, unit: str) -> str:
    return f"{name.replace('_', ' ')} ({unit})" if unit else name.replace("_", " ")


def _curve(name: str, curve: Curve, title: str) -> Figure:
    figure, axes = _axes(title)
    axes.plot(curve.x, curve.y, marker=".")
    if curve.error is not None:
        low, high = curve.y - 2 * curve.error, curve.y + 2 * curve.error
        axes.fill_between(curve.x, low, high, alpha=0.25, label="±2 standard errors")
        axes.legend(frameon=False)
    axes.set_xlabel(_label(curve.x_name, curve.x_unit))
    axes.set_ylabel(_label(name, curve.y_unit))
    return figure


def _spectrum(result: Result, title: str) -> Figure:
    """The eigenvalues found at both ends of the spectrum, with what is known of their error."""
    figure, axes = _axes(f"{title}: ends of the Hessian spectrum")
    curve = result.curves["eigenvalue"]
    positions = range(len(curve.x))
    colours = ["tab:blue" if value >= 0 else "tab:red" for value in curve.y]
    axes.bar(positions, curve.y, color=colours, width=0.6)
    for name, position in (("lambda_max", 0), ("lambda_min", len(curve.x) - 1)):
        metric = result.metrics[name]
        error = 2 * metric.errors.get("data", 0.0)
        axes.errorbar(position, metric.value, yerr=error, color="black", capsize=4)
        text = f"{metric.value:.3g} ± {error:.2g}"
        axes.annotate(
            text,
            (position, max(metric.value, 0) + error),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(list(positions), [f"λ{_subscript(int(i))}" for i in curve.x])
    axes.set_ylabel("eigenvalue (loss)")
    samples = int(result.metrics["n_samples"].value)
    axes.set_xlabel(f"index from either end; ±2 standard errors over {samples} samples")
    axes.margins(y=0.15)
    return figure


def _subscript(index: int) -> str:
    digits = str(index).translate(str.maketrans("0123456789-", "₀₁₂₃₄₅₆₇₈₉₋"))
    return digits


DRAWINGS: dict[str, Callable[[Result, str], Figure]] = {"lanczos": _spectrum}

"""The eigenvalues found at both ends of the spectrum, with what is known of their error."""

from __future__ import annotations

from matplotlib.figure import Figure

from lsa.plots.axes import axes
from lsa.probe import Result


def draw(result: Result, title: str) -> Figure:
    """Bars of the eigenvalues, ±2 standard errors at the outermost."""
    figure, plot = axes(f"{title}: ends of the Hessian spectrum")
    curve = result.curves["eigenvalue"]
    positions = range(len(curve.x))
    colours = ["tab:blue" if value >= 0 else "tab:red" for value in curve.y]
    plot.bar(positions, curve.y, color=colours, width=0.6)
    for name, position in (("lambda_max", 0), ("lambda_min", len(curve.x) - 1)):
        metric = result.metrics[name]
        error = 2 * metric.errors.get("data", 0.0)
        plot.errorbar(position, metric.value, yerr=error, color="black", capsize=4)
        plot.annotate(
            f"{metric.value:.3g} ± {error:.2g}",
            (position, max(metric.value, 0) + error),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
        )
    plot.axhline(0, color="black", linewidth=0.8)
    plot.set_xticks(list(positions), [f"λ{_subscript(int(i))}" for i in curve.x])
    plot.set_ylabel("eigenvalue (loss)")
    samples = int(result.metrics["n_samples"].value)
    plot.set_xlabel(f"index from either end; ±2 standard errors over {samples} samples")
    plot.margins(y=0.15)
    return figure


def _subscript(index: int) -> str:
    return str(index).translate(str.maketrans("0123456789-", "₀₁₂₃₄₅₆₇₈₉₋"))

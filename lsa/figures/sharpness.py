"""The loss on the way to SAM's step and to the worst case, and under random noise."""

from __future__ import annotations

from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes, written
from lsa.probe import Result

WAYS = {"worst": ("worst_case", "worst case", A), "sam": ("sam_rise", "SAM's step", B)}
PANELS = {"": "plain: |ε| ≤ {:g}", "adaptive_": "adaptive: |ε/θ| ≤ {:g}"}


def draw(result: Result, title: str) -> Figure:
    """Plain perturbations on the left, those relative to each weight on the right."""
    figure, panels = axes(f"{title}: sharpness", 2)
    sizes = zip(
        panels, PANELS.items(), result.arrays["radii"], result.arrays["sigmas"], strict=True
    )
    for panel, (prefix, text), radius, sigma in sizes:
        for way, (number, name, colour) in WAYS.items():
            curve = result.curves.get(f"{prefix}rise_along_{way}")
            if curve is None or curve.error is None:
                continue
            metric = result.metrics[f"{prefix}{number}"]
            panel.plot(curve.x, curve.y, color=colour, label=f"{name}: {written(metric)}")
            low, high = curve.y - 2 * curve.error, curve.y + 2 * curve.error
            panel.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
        average = result.metrics[f"{prefix}average_case"]
        noise = f"{sigma:g} |θ|" if prefix else f"{sigma:g}"
        label = f"average under noise of σ = {noise}: {written(average)}"
        panel.axhline(average.value, color="grey", linestyle="--", label=label)
        spread = 2 * average.errors.get("data", 0.0)
        low, high = average.value - spread, average.value + spread
        panel.axhspan(low, high, color="grey", alpha=0.2, linewidth=0)
        if batches := result.metrics.get(f"{prefix}m_sharpness"):
            bars = 2 * batches.errors.get("data", 0.0)
            label = f"mean over batches: {written(batches)}"
            panel.errorbar(1, batches.value, yerr=bars, fmt="o", color="k", capsize=4, label=label)
        panel.axhline(0, color="black", linewidth=0.5)
        panel.set_title(text.format(radius), fontsize=10)
        panel.set_xlabel("share of the perturbation")
        panel.set_ylabel("loss rise")
        panel.legend()
    text = "± and bands: 2 standard errors over the samples; bands of fixed perturbations"
    figure.supxlabel(text, fontsize=10)
    return figure

"""Loss along the sharpest, the most negative and a random direction."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lsa.figures.axes import axes
from lsa.probe import Result

DIRECTIONS = {
    "top": ("C0", "top eigenvector, λ_max = {lambda_max:.3g}"),
    "bottom": ("C1", "bottom eigenvector, λ_min = {lambda_min:.3g}"),
    "random": ("#777777", "random direction"),
}


def draw(result: Result, title: str) -> Figure:
    """The whole grid on the left; on the right the middle, where the quadratic model holds."""
    figure, panels = axes(f"{title}: loss along unit directions", 2)
    values = {name: metric.value for name, metric in result.metrics.items()}
    eps = result.arrays["eps_list"]
    for name, (colour, text) in DIRECTIONS.items():
        curve = result.curves[f"loss_along_{name}"]
        for panel in panels:
            panel.plot(eps, curve.y, color=colour, label=text.format(**values))
            if curve.error is not None:
                low, high = curve.y - 2 * curve.error, curve.y + 2 * curve.error
                panel.fill_between(eps, low, high, color=colour, alpha=0.2, linewidth=0)
    near = max(0.25 * eps.max(), 2 * (eps[1] - eps[0]))
    fine = np.linspace(eps.min(), eps.max(), 201)
    model = values["slope"] * fine + values["lambda_max"] * fine**2 / 2
    for panel in panels:
        panel.plot(fine, model, "k:", linewidth=1, label="gᵀv ε + λ_max ε²/2")
        panel.axhline(0, color="black", linewidth=0.5)
        panel.set_xlabel("step ε along the direction (length in θ)")
        panel.set_ylabel("loss rise")
    inside = np.abs(eps) <= near
    shown = np.concatenate([result.curves[f"loss_along_{n}"].y[inside] for n in DIRECTIONS])
    margin = 0.1 * np.ptp(shown)
    panels[1].set_xlim(-near, near)
    panels[1].set_ylim(shown.min() - margin, shown.max() + margin)
    panels[1].set_title(f"fitted curvature {values['curvature_fit']:.4g}", fontsize=10)
    panels[0].legend()
    panels[0].set_title("bands: ±2 standard errors over the samples", fontsize=10)
    return figure

"""What was measured during a training, over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from lsa.figures.axes import PANEL, make_logarithmic

Column = Callable[[str], tuple[Sequence[float], Sequence[float]]]
"""Name → steps and values; both empty where it was not measured."""

PANELS: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("loss", False, (("loss", "training"), ("probe_loss", "probe set"))),
    (
        "sharpness (loss)",
        True,
        (
            ("lambda_max", "λ_max"),
            ("sharpness", "λ_max of P⁻¹H"),
            ("threshold", "stability threshold"),
            ("batch_sharpness", "on batches"),
            ("directional_sharpness", "along the update"),
        ),
    ),
    ("critical factor", True, (("critical_factor", "how much longer the step could be"),)),
    ("noise scale (samples)", True, (("noise_scale", "gradient noise scale"),)),
    ("norm", True, (("gradient_norm", "gradient"), ("update_norm", "update"))),
    ("update/weight", True, (("update_ratio", "|u|/|θ|"),)),
)
FEW = 40  # points that are marked


def draw(column: Column, title: str, alarms: Sequence[int] = ()) -> Figure:
    """A panel for each group of numbers that was measured.

    Args:
        column: What was measured.
        title: Of the figure.
        alarms: Steps that are marked in every panel.
    """
    groups = [g for g in PANELS if any(len(column(name)[0]) for name, _ in g[2])]
    columns = 2 if len(groups) > 1 else 1
    rows = max(1, -(-len(groups) // columns))
    figure = Figure((PANEL[0] * columns, 0.75 * PANEL[1] * rows), layout="constrained", dpi=120)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    figure.suptitle(title)
    for panel, (label, logarithmic, lines) in zip(panels, groups, strict=False):
        _panel(panel, column, label, logarithmic, lines)
        for i, step in enumerate(alarms):
            name = None if i else "alarm"
            panel.axvline(step, color="tab:red", linewidth=0.8, linestyle=":", label=name)
        # Above the panel, where no line is.
        position = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
        panel.legend(fontsize=8, **position)
    for panel in [*panels][len(groups) :]:
        panel.set_axis_off()
    return figure


def _panel(
    panel: Any, column: Column, label: str, logarithmic: bool, lines: Sequence[tuple[str, str]]
) -> None:
    for name, text in lines:
        steps, values = column(name)
        if len(steps):
            mark = "." if len(steps) <= FEW else None
            style = {"color": "black", "linestyle": "--"} if name == "threshold" else {}
            panel.plot(steps, values, label=text, marker=mark, linewidth=1, **style)
            low, high = column(f"{name}_low"), column(f"{name}_high")
            if len(low[0]):  # a 95 % interval; where it has no upper end, it leaves the panel
                shown = [max(v, 0.1 * min(values)) for v in low[1]]  # the axis has no 0
                known, top = dict(zip(*high, strict=True)), 10 * max(*values, *high[1])
                upper = [known.get(step, top) for step in low[0]]
                panel.fill_between(low[0], shown, upper, alpha=0.2, linewidth=0)
    if logarithmic:
        make_logarithmic(panel, y=True)
    panel.set_ylabel(label)
    panel.set_xlabel("step")

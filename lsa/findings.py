"""Findings of a study: each optimizer against each other on every headline number, by seeds."""

from __future__ import annotations

from dataclasses import dataclass

from lsa import probe
from lsa.comparison import Comparison, Scale, compare
from lsa.measurements import Measurement, check_alike

TRAINING = ("final/val_accuracy", "final/train_loss")


@dataclass(frozen=True)
class Finding:
    """One pair of optimizers on one number."""

    metric: str
    comparison: Comparison


def headline(measurements: list[Measurement], *, pairs: bool = False) -> list[str]:
    """Full names of the headline numbers of what was measured, training first."""
    steps = {m.step for m in measurements}
    names = [
        f"{name}/{metric}"
        for name in probe.modules()
        if name in steps and probe.find(name).pair == pairs
        for metric in probe.find(name).headline
    ]
    return names if pairs or "train" not in steps else [*TRAINING, *names]


def findings(measurements: list[Measurement]) -> list[Finding]:
    """All pairs of optimizers on accuracy, train loss and every headline number.

    The train loss is among them because curvature falls and rises with it: optimizers that stopped
    at different losses differ in sharpness for that reason alone.

    Raises:
        InputError: Measurements that are not alike: other options or samples.
    """
    found = []
    for metric in headline(measurements):
        step = "train" if metric in TRAINING else metric.partition("/")[0]
        runs = [m for m in measurements if m.step == step]
        check_alike(step, [m.done for m in runs])
        values: dict[str, dict[int, float]] = {}
        for m in runs:
            if metric in m.numbers:
                values.setdefault(m.subject, {})[m.seed] = m.numbers[metric]
        if len(values) > 1:
            found += [Finding(metric, c) for c in compare(values, scale=_scale(metric, values))]
    return found


def _scale(metric: str, values: dict[str, dict[int, float]]) -> Scale:
    """Ratios for positive sizes, differences for shares and for what changes sign."""
    positive = all(v > 0 for by_seed in values.values() for v in by_seed.values())
    return "ratio" if positive and "accuracy" not in metric else "difference"

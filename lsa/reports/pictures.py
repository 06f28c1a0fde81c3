"""The figures of a report: the curves of all checkpoints, drawn from the tracking store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsa import probe
from lsa.figures import draw, words
from lsa.figures.draw import inside
from lsa.reports import doubts
from lsa.reports.artifacts import StoredCurve, StoredResult, Trajectory, artifacts
from lsa.reports.measurements import Measurement, values

Curves = Mapping[str, StoredCurve]

SCALED = {"relative_epsilon": "length of the step in θ"}  # x of a curve, as a length
SEEDS = "Thin lines are seeds, bold ones their medians. "
PAIRS = (
    "Train loss between the checkpoints of each pair at one seed: on the straight line, after "
    "renumbering hidden units, and on the path that was found. A path only bounds the barrier from "
    "above; that none lower was found does not separate the minima."
)
BARRIERS = (
    "Mean barrier over the seeds. A high number on the straight line says that the weights differ, "
    "not that the minima are separated; below the diagonal only what the search could not avoid is "
    "left."
)
THRESHOLD = (
    "Dashed: the value above which the optimizer's own step is unstable (with full gradients; "
    "mini-batch SGD stays below it). "
)
TRAJECTORY = (
    "Compare on the right, at equal train loss: at the same epoch the optimizers have come to "
    "different losses."
)


@dataclass(frozen=True)
class Picture:
    """A figure with what to see in it, and what not to conclude."""

    title: str
    caption: str
    png: bytes


def pictures(
    measurements: Sequence[Measurement], trajectories: Sequence[Trajectory]
) -> Iterator[Picture]:
    """Training first, then each probe, then the pairs."""
    known = probe.modules()
    probes = [m for m in measurements if m.step in known]
    between = {m.step for m in probes if probe.find(m.step).between}
    results = artifacts([(m.done, f"{m.step}.json") for m in probes], StoredResult)
    stored: dict[str, list[tuple[Measurement, Curves]]] = {}
    for m, result in zip(probes, results, strict=True):
        if result.curves:
            stored.setdefault(m.step, []).append((m, result.curves))
    for step in dict.fromkeys(trajectory.probe for trajectory in trajectories):
        declared = probe.find(step)
        for metric in declared.during or declared.headline[:1]:
            picture = _trajectory(step, metric, trajectories, measurements)
            if picture:
                yield picture
    for step, curves in stored.items():
        if step not in between:
            yield _overlay(step, curves, measurements)
    pairs = [pair for step, curves in stored.items() for pair in curves if step in between]
    if pairs:
        yield _profiles(pairs, measurements)
    yield from _barriers(measurements, _failed(pairs))


def _overlay(
    step: str, curves: list[tuple[Measurement, Curves]], measurements: Sequence[Measurement]
) -> Picture:
    """The main curve of a probe, all checkpoints or pairs in one figure."""
    declared, first = probe.find(step), curves[0][1]
    y_name = declared.curve if declared.curve in first else next(iter(first))
    lines, scale = _nothing(measurements), f"{step}/{declared.scale}"
    scaled = all(scale in m.numbers for m, _ in curves)
    for m, curve in curves:
        if y_name in curve:
            x, y = _points(curve[y_name])
            lines.setdefault(m.subject, []).append((x * m.numbers[scale] if scaled else x, y))
    levels = {
        subject: (float(np.mean(list(by_seed.values()))), f"{subject}: enough")
        for subject, by_seed in values(measurements, f"{step}/threshold").items()
    }
    x_name = first[y_name].x_name
    if scaled:
        lines, x_name = _shared_range(lines), SCALED.get(x_name, x_name)
    title = f"{words.quantity(y_name)} ({step})"
    png = draw.png(draw.overlay("", x_name, y_name, lines, levels))
    meant = declared.curve in ("", y_name)
    caption = (declared.caption if meant else "") or declared.summary
    if doubt := doubts.unconverged([m for m, _ in curves]):
        caption = f"{doubt[0].upper()}{doubt[1:]}. {caption}"
    return Picture(title, _seeds(lines) + caption, png)


def _seeds(lines: Mapping[str, Sequence[Any]]) -> str:
    """A sentence on thin and bold lines, if a figure has both."""
    return SEEDS if any(len(many) > 1 for many in lines.values()) else ""


def _shared_range(lines: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Curves around 0 as far as all of them reach."""
    reach = min(np.abs(x).max() for many in lines.values() for x, _ in many)
    groups: dict[str, list[Any]] = {}
    for subject, many in lines.items():
        for x, y in many:
            within = np.abs(x) <= reach * (1 + 1e-9)
            groups.setdefault(subject, []).append((x[within], y[within]))
    return groups


def _nothing(measurements: Sequence[Measurement]) -> dict[str, list[Any]]:
    """Every optimizer without a curve yet: each has the same colour in all figures."""
    return {m.subject: [] for m in measurements if m.step == "train"}


def _trajectory(
    step: str,
    metric: str,
    trajectories: Sequence[Trajectory],
    measurements: Sequence[Measurement],
) -> Picture | None:
    """One quantity of a trajectory; what is never finite is not drawn."""
    mine = [c for c in trajectories if c.probe == step and metric in c.metrics]
    by_epoch, by_loss = _nothing(measurements), _nothing(measurements)
    thresholds = {}
    for c in mine:
        x, loss, y = (np.asarray(v, float) for v in (c.epochs, c.train_loss, c.metrics[metric]))
        kept = np.isfinite(y) & np.isfinite(loss)
        if not kept.any():
            continue
        by_epoch.setdefault(c.subject, []).append((x[kept], y[kept]))
        by_loss.setdefault(c.subject, []).append((loss[kept], y[kept]))
        if metric == "lambda_max" and math.isfinite(c.threshold):
            formula = f"{c.formula} = " if c.formula else ""
            thresholds[c.subject] = (c.threshold, f"{c.subject}: {formula}{c.threshold:.3g}")
    if not any(by_epoch.values()):
        return None
    name = words.quantity(metric)
    title = f"{name} during training ({step})"
    png = draw.png(draw.epochs("", name, by_epoch, by_loss, thresholds))
    return Picture(title, _seeds(by_epoch) + THRESHOLD * bool(thresholds) + TRAJECTORY, png)


def _profiles(
    curves: list[tuple[Measurement, Curves]], measurements: Sequence[Measurement]
) -> Picture:
    """Every pair in a panel of its own."""
    panels: dict[str, dict[str, list[Any]]] = {}
    for m, curve in curves:
        for name, way in probe.find(m.step).between.items():
            if name in curve:
                points = inside(*_points(curve[name]))
                panels.setdefault(m.subject, {}).setdefault(way, []).append(points)
    known = values(measurements, "auto_neb/log_classes").values()
    bounds = [value for by_seed in known for value in by_seed.values()]
    of_pairs = {f"{pair}{way}": many for pair, ways in panels.items() for way, many in ways.items()}
    png = draw.png(draw.profiles(panels, bounds[0] if bounds else None))
    return Picture("loss between the optimizers", _seeds(of_pairs) + PAIRS + _failed(curves), png)


def _failed(curves: Sequence[tuple[Measurement, Curves]]) -> str:
    """A sentence that names searches for a path without convergence."""
    steps: dict[str, list[Measurement]] = {}
    for m, _ in curves:
        steps.setdefault(m.step, []).append(m)
    said = ((step, doubts.unconverged(runs)) for step, runs in steps.items())
    return "".join(f" {step}: {doubt}." for step, doubt in said if doubt)


def _barriers(measurements: Sequence[Measurement], failed: str) -> Iterator[Picture]:
    """The heat map of barriers, where there is one."""
    names = list(dict.fromkeys(m.subject for m in measurements if m.step == "train"))
    line, path = (_means(measurements, f"{step}/barrier") for step in ("interpolation", "auto_neb"))
    if len(names) > 1 and (line or path):
        ways = ("straight line", "minimum-energy path")
        png = draw.png(draw.barriers(names, line, path, ways))
        yield Picture("barriers", BARRIERS + failed, png)


def _means(measurements: Sequence[Measurement], metric: str) -> dict[tuple[str, str], float]:
    """Pair of optimizers → mean over the seeds."""
    means = {}
    for pair, by_seed in values(measurements, metric).items():
        a, b = pair.split(" – ")
        means[a, b] = float(np.mean(list(by_seed.values())))
    return means


def _points(curve: StoredCurve) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(curve.x), np.array(curve.y)
    kept = np.isfinite(y)
    return x[kept], y[kept]

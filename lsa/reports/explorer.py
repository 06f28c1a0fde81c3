"""What the explorer shows of a project: its checkpoints, and what was measured on and between them.

The numbers are the report's, written with the same errors and the same doubts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lsa import probe
from lsa.figures import explorer, interactive, words
from lsa.project import Project
from lsa.reports import doubts, links, summary
from lsa.reports.artifacts import (
    StoredCurve,
    StoredResult,
    Trajectory,
    artifacts,
    read_trajectories,
)
from lsa.reports.extent import compared, extent
from lsa.reports.measurements import Measurement, between, newest, nothing_measured
from lsa.reports.numbers import written
from lsa.reports.records import notes
from lsa.reports.tables import LEADING, headline, title, worst
from lsa.runtime.documents import whole_number
from lsa.runtime.errors import InputError
from lsa.tracking import registered, results, runs
from lsa.tracking.numbers import numbers

ENDS = ("_residual", "_low", "_high", "/converged", "/n_samples", "/products")  # of no axis


@dataclass(frozen=True)
class Point:
    """A checkpoint that a training kept."""

    training: Measurement
    epoch: int
    last: bool
    # Full name → value, lower and upper end (nan where unknown), and as the report writes it.
    numbers: dict[str, tuple[float, float, float, str]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def add(self, values: Mapping[str, float], names: Iterable[str], doubt: str = "") -> None:
        """Add numbers of a run, unless they are known already.

        Args:
            values: All numbers of the run, by full name.
            names: Those to add.
            doubt: A remark that the page shows beside each; "" for none.
        """
        for name in names:
            if name in values and name not in self.numbers:
                text = written([values], name)
                self.numbers[name] = (*_ends(values, name), f"{text}; {doubt}" if doubt else text)


def page(setting: Project) -> str:
    """The explorer of a project, one file.

    Raises:
        InputError: Nothing measured, or an artifact that lsa did not write.
    """
    return explorer.page(content(setting))


def content(setting: Project) -> dict[str, Any]:
    """Everything that the page shows, as JSON values.

    Raises:
        InputError: Nothing of the project is measured.
    """
    done = list(runs.finished_steps(setting.name))
    everything = newest(setting, done)
    if not everything:
        raise nothing_measured(setting)
    trainings = [m for m in everything if m.step == "train"]
    points = list(_points(setting, everything, trainings))
    number = {p.training.done.run_id: i for i, p in enumerate(points) if p.last}
    single = [m for m in everything if m.step in probe.modules() and not probe.find(m.step).pair]
    at = {(p.training.subject, p.training.seed): i for i, p in enumerate(points) if p.last}
    return {
        "title": f"{setting.name}: explorer",
        "about": compared(setting, everything),
        "errors": summary.ERRORS,
        "optimizers": extent(everything).optimizers,
        "leading": [name for name in LEADING if any(name in p.numbers for p in points)],
        "columns": list(_columns(everything, points)),
        "points": [_point(p) for p in points],
        "curves": list(_curves(single, at)),
        "edges": list(_edges(between(setting, done, trainings), number)),
        "surfaces": [_surface(m, at[m.subject, m.seed]) for m in single if m.step == "surface"],
    }


# --- checkpoints ----------------------------------------------------------------------------------


def _points(
    setting: Project, everything: Sequence[Measurement], trainings: Sequence[Measurement]
) -> Iterator[Point]:
    """The checkpoints of every training, by epoch."""
    kept = registered.numbers_by_epoch(setting.name)
    trajectories: dict[tuple[str, int], list[Trajectory]] = {}
    for trajectory in read_trajectories(everything):
        trajectories.setdefault((trajectory.subject, trajectory.seed), []).append(trajectory)
    of: dict[tuple[str, int], list[Measurement]] = {}
    for m in everything:
        of.setdefault((m.subject, m.seed), []).append(m)
    pairs = headline(everything, pairs=True)
    for training in trainings:
        key = training.subject, training.seed
        own, series = of[key], trajectories.get(key, [])
        measured_on = {m.step.partition(".")[2]: m for m in own if m.step.startswith("trajectory.")}
        on_the_way = kept.get(training.done.tags.get("lsa.key", ""), {})
        epochs = {*on_the_way, *(int(e) for t in series for e in t.epochs)}
        last = whole_number(training.done.params.get("epochs", "")) or max(epochs, default=0)
        for epoch in sorted({e for e in epochs if e < last} | {last}):
            point = Point(training, epoch, epoch == last)
            if point.last:
                _measured(point, own)
                seed = [m for m in everything if m.seed == training.seed]
                for name in pairs:
                    for m in worst(seed, name, training.subject):
                        point.add(m.numbers, [name], doubts.unconverged([m], name_subjects=False))
            point.add(on_the_way.get(epoch, {}), _names(on_the_way.get(epoch, {})))
            for trajectory in series:
                _add_trajectory(point, trajectory, measured_on[trajectory.probe])
            yield point


def _measured(point: Point, own: Sequence[Measurement]) -> None:
    """The numbers of a training and of the probes on its last checkpoint."""
    for m in own:
        if m.step == "train" or m.step in probe.modules():
            doubt = doubts.unconverged([m], name_subjects=False)
            point.add(m.numbers, _names(m.numbers, m.done.tags.get("lsa.curves", "")), doubt)
            said = [f"{m.step}: {text}" for text in notes(m.done.tags)]
            point.doubts.extend([f"{m.step}: {doubt}"] * bool(doubt) + said)


def _add_trajectory(point: Point, trajectory: Trajectory, run: Measurement) -> None:
    """The numbers of a probe along the training, at this epoch."""
    if point.epoch not in trajectory.epochs:
        return
    i = trajectory.epochs.index(point.epoch)
    values = {
        f"{trajectory.probe}/{name}": column[i] for name, column in trajectory.metrics.items()
    }
    for name, errors in trajectory.errors.items():
        values |= {f"{trajectory.probe}/{name}_se_{of}": column[i] for of, column in errors.items()}
    values = {name: v for name, v in values.items() if not math.isnan(v)}
    doubt = doubts.unconverged([run], name_subjects=False)
    point.add(values, _names(values), f"along the training {doubt}" if doubt else "")
    trained = {"final/train_loss": trajectory.train_loss[i]}
    if trajectory.accuracy:
        trained["final/val_accuracy"] = trajectory.accuracy[i]
    point.add(trained, trained)


def _names(values: Mapping[str, float], curves: str = "") -> list[str]:
    """Names of the numbers that a reader may want on an axis."""
    known = numbers(values, curves.split())
    return [name for name in known if not name.endswith(ENDS)]


def _ends(values: Mapping[str, float], name: str) -> tuple[float, float, float]:
    """A value with the ends of its 95 % interval; nan where there is none."""
    value = values[name]
    low, high = (values.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
    errors = [e for k, e in values.items() if k.startswith(f"{name}_se_")]
    if errors and math.isnan(low + high):
        low, high = value - 2 * max(errors), value + 2 * max(errors)
    return value, low, high


def _point(p: Point) -> dict[str, Any]:
    return {
        "optimizer": p.training.subject,
        "seed": p.training.seed,
        "epoch": p.epoch,
        "last": p.last,
        "run": p.training.done.run_id,
        "link": links.of_run(p.training.done),
        "numbers": {
            name: [*(explorer.number(v) for v in ends), text]
            for name, (*ends, text) in p.numbers.items()
        },
        "doubts": list(dict.fromkeys(p.doubts)),
    }


def _columns(everything: Sequence[Measurement], points: Sequence[Point]) -> Iterator[list[str]]:
    """Every number's full name and what it is in words; headline numbers first."""
    present = {name: None for p in points for name in p.numbers}
    first = [*LEADING, *headline(everything), *headline(everything, pairs=True)]
    for name in dict.fromkeys([*first, *present]):
        if name in present:
            yield [name, title(name) if name in first else words.quantity(name)]


# --- curves, ways and surfaces --------------------------------------------------------------------


def _curves(single: Sequence[Measurement], at: Mapping[Any, int]) -> Iterator[dict[str, Any]]:
    """Every curve of every probe with its line at each checkpoint; a probe's main one first."""
    stored = artifacts([(m.done, f"{m.step}.json") for m in single], StoredResult)
    drawn: dict[tuple[str, str], dict[str, Any]] = {}
    for m, result in zip(single, stored, strict=True):
        main = probe.find(m.step).curve
        for name, curve in sorted(result.curves.items(), key=lambda item: item[0] != main):
            about = {
                "title": f"{words.quantity(name)} ({m.step}/{name})",
                "x": words.axis(curve.x_name),
                "y": words.quantity(name),
                "lines": [],
            }
            lines = drawn.setdefault((m.step, name), about)["lines"]
            lines.append({"point": at[m.subject, m.seed], **_line(curve)})
    yield from sorted(drawn.values(), key=lambda about: "density" not in about["title"])


def _edges(
    pairs: Sequence[tuple[Measurement, Measurement, Measurement]], number: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Measurements between two checkpoints: profiles, headline numbers and remarks on them."""
    pairs = sorted(
        (pair for pair in pairs if pair[0].step in probe.modules()),
        key=lambda pair: pair[0].done.started,
    )
    stored = artifacts([(m.done, f"{m.step}.json") for m, _, _ in pairs], StoredResult)
    edges: dict[tuple[int, int], dict[str, Any]] = {}
    for (m, a, b), result in zip(pairs, stored, strict=True):
        declared = probe.find(m.step)
        ends = number[a.done.run_id], number[b.done.run_id]
        edge = edges.setdefault(
            ends, {"a": ends[0], "b": ends[1], "ways": [], "numbers": [], "doubts": []}
        )
        doubt = doubts.unconverged([m], name_subjects=False)
        for name, way in declared.between.items():
            if name in result.curves:
                edge["ways"].append({"way": way, "doubt": doubt, **_line(result.curves[name])})
        for short in declared.headline:
            name = f"{m.step}/{short}"
            if name in m.numbers:
                text = written([m.numbers], name)
                edge["numbers"].append(
                    [words.quantity(name), f"{text}; {doubt}" if doubt else text]
                )
        said = [f"{m.step}: {text}" for text in notes(m.done.tags)]
        edge["doubts"] += [f"{m.step}: {doubt}"] * bool(doubt) + said
    yield from edges.values()


def _line(curve: StoredCurve) -> dict[str, Any]:
    error = curve.y_standard_error
    return {
        "x": explorer.numbers(curve.x),
        "y": explorer.numbers(curve.y),
        "error": None if error is None else explorer.numbers(error),
    }


def _surface(m: Measurement, point: int) -> dict[str, Any]:
    """The loss on a plane through a checkpoint."""
    try:
        plane = interactive.plane(results.read(m.done.run_id))
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"run {m.done.run_id} holds no surface that lsa wrote ({error}); delete it and measure "
            "again"
        ) from None
    return {"point": point, **plane}

"""A study: every step of a project, as plain Python over memoised steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lsa import probe, steps, tracking
from lsa.checkpoint import Checkpoint
from lsa.errors import InputError
from lsa.project import Project
from lsa.steps import Step
from lsa.train import Diverged


@dataclass
class Row:
    """What was measured on one checkpoint."""

    optimizer: str
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """All rows of a study, and what failed."""

    rows: list[Row] = field(default_factory=list)
    done: int = 0
    reused: int = 0
    failures: list[str] = field(default_factory=list)


def study(setting: Project, *, device: str = "auto", say: Any = print) -> Outcome:
    """Train every optimizer × seed, run every probe on every checkpoint and pair.

    A step that has finished before, with the same options, inputs and code, is not run again. One
    that fails does not stop those that do not depend on it.

    Args:
        setting: The project.
        device: Where to compute.
        say: Told one line per step.
    """
    outcome = Outcome()
    place = steps.device_of(device)
    tags = {"lsa.step": "study", "project": setting.name}
    name = f"study-{setting.name}"
    with tracking.run(name, experiment=setting.name, tags=tags, device=place) as opened:
        opened.params({"project": setting.name})
        opened.json(setting.model_dump(), "project.json")
        points = _train_all(setting, place, outcome, say)
        _measure_all(setting, points, outcome, say)
        _pair_all(setting, points, outcome, say)
        opened.text(table(outcome.rows), "table.md")
        opened.metrics({"steps_done": outcome.done, "steps_reused": outcome.reused})
        if outcome.failures:
            failed = len(outcome.failures)
            raise InputError(f"{failed} of the study's steps failed: {outcome.failures[0]}")
    return outcome


def _train_all(
    setting: Project, place: str, outcome: Outcome, say: Any
) -> list[tuple[Row, Checkpoint]]:
    points = []
    for seed in setting.seeds:
        for optimizer in setting.optimizers:
            recipe = setting.recipe(optimizer, seed)
            trusted = steps.trusted_by(recipe)
            label = f"train {optimizer} seed {seed}"

            def step(recipe: Any = recipe, trusted: Any = trusted) -> Step:
                return steps.train(recipe, device=place, reuse=True, trusted=trusted)

            done = _attempt(label, step, outcome, say)
            if done:
                row = Row(optimizer, seed, dict(done.metrics))
                outcome.rows.append(row)
                found = tracking.fetch(done.address, device=place, trusted=trusted)
                points.append((row, found))
    return points


def _measure_all(
    setting: Project, points: list[tuple[Row, Checkpoint]], outcome: Outcome, say: Any
) -> None:
    for name in setting.probes:
        options = setting.options(probe.find(name))
        for row, source in points:
            label = f"{name} {row.optimizer} seed {row.seed}"

            def step(name: Any = name, source: Any = source, options: Any = options) -> Step:
                return steps.measure(name, source, reuse=True, **options)

            done = _attempt(label, step, outcome, say)
            if done:
                row.metrics.update(done.metrics)


def _pair_all(
    setting: Project, points: list[tuple[Row, Checkpoint]], outcome: Outcome, say: Any
) -> None:
    """Every pair of optimizers at the same seed."""
    for name in setting.pairs:
        options = setting.options(probe.find(name))
        for (row_a, a), (row_b, b) in combinations(points, 2):
            if row_a.seed != row_b.seed:
                continue
            label = f"{name} {row_a.optimizer}–{row_b.optimizer} seed {row_a.seed}"

            def step(name: Any = name, a: Any = a, b: Any = b, options: Any = options) -> Step:
                return steps.measure(name, a, b, reuse=True, **options)

            _attempt(label, step, outcome, say)


def _attempt(label: str, step: Any, outcome: Outcome, say: Any) -> Step | None:
    """Run one step; a failure that is the input's is recorded, and the study goes on."""
    try:
        done = step()
    except (InputError, Diverged) as error:
        outcome.failures.append(f"{label}: {error}")
        say(f"{label}: failed: {error}")
        return None
    outcome.done += not done.reused
    outcome.reused += done.reused
    say(f"{label}: {'reused' if done.reused else 'done'} (run {done.run_id})")
    return done


def columns(rows: list[Row]) -> dict[str, str]:
    """Heading → metric of the comparison table: accuracy, then the probes' headline numbers."""
    found = {"val accuracy": "final/val_accuracy"}
    for name in probe.modules():
        declared = probe.find(name)
        for metric in declared.headline:
            key = f"{name}/{metric}"
            if any(key in row.metrics for row in rows):
                found[metric] = key
    return found


def cells(rows: list[Row]) -> Iterator[list[str]]:
    """The table's cells, one list per row; a number has two standard errors where it has one."""
    headings = columns(rows)
    for row in rows:
        yield [
            row.optimizer,
            str(row.seed),
            *(_number(row.metrics, key) for key in headings.values()),
        ]


def _number(metrics: dict[str, float], key: str) -> str:
    if key not in metrics:
        return "–"
    error = metrics.get(f"{key}_se_data")
    return f"{metrics[key]:.4g}" + (f" ± {2 * error:.2g}" if error is not None else "")


def table(rows: list[Row]) -> str:
    """The comparison table in Markdown; ± is two standard errors over the samples."""
    headings = ["optimizer", "seed", *columns(rows)]
    lines = [headings, ["---"] * len(headings), *cells(rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)

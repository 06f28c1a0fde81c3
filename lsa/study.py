"""A study: every step of a project, as plain Python over memoised steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lsa import probe, registry, steps, tracking
from lsa import report as reports
from lsa.checkpoint import Checkpoint, load_data
from lsa.errors import InputError
from lsa.factories import nearest
from lsa.measurements import newest, written
from lsa.project import Project
from lsa.steps import Step
from lsa.train import Diverged


@dataclass
class Row:
    """What was measured on one checkpoint, or on a pair of them."""

    optimizer: str  # of a pair: both
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """All rows of a study, and what failed."""

    rows: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    done: int = 0
    reused: int = 0
    failures: list[str] = field(default_factory=list)


def only(setting: Project, names: Collection[str]) -> Project:
    """The project with those of its probes alone.

    Raises:
        InputError: A name that is no probe of the project.
    """
    known = [*setting.probes, *setting.pairs]
    for name in names:
        if name not in known:
            raise InputError(
                f"project {setting.name} has no probe {name!r}.{nearest(name, known)} "
                f"It has {', '.join(known)}"
            )
    chosen = {
        section: {k: v for k, v in getattr(setting, section).items() if k in names}
        for section in ("probes", "pairs")
    }
    return setting.model_copy(update=chosen)


def plan(setting: Project, *, device: str = "auto") -> list[tuple[str, str]]:
    """Every step of a study and what would become of it, without running any.

    `reused`: it has finished with the same options, inputs, data and code. `changed`: it has
    finished, but one of them differs. `new`: it has not. A step whose checkpoint is to be trained
    again follows it.
    """
    place = steps.device_of(device)
    before = {(m.step, m.subject, m.seed) for m in newest(setting)}
    models: dict[tuple[str, int], str] = {}
    found = []

    def state(
        step: str, subject: str, seed: int, key: str | None
    ) -> tuple[str, tracking.Done | None]:
        done = tracking.finished(key) if key else None
        if done:
            return "reused", done
        return "changed" if (step, subject, seed) in before else "new", None

    for seed in setting.seeds:
        for optimizer in setting.optimizers:
            recipe = setting.recipe(optimizer, seed)
            key = steps.train_key(recipe, load_data(recipe, place).hash, place)
            what, done = state("train", optimizer, seed, key)
            if done:
                models[optimizer, seed] = done.tags["lsa.model_id"]
            found.append((f"train {optimizer} seed {seed}", what))
    for name in [*setting.probes, *setting.pairs]:
        declared = probe.find(name)
        options = setting.options(declared)
        for seed in setting.seeds:
            for subject in combinations(setting.optimizers, 1 + declared.pair):
                inputs = [models[o, seed] for o in subject if (o, seed) in models]
                ready = len(inputs) == len(subject)
                samples = setting.landscape.samples
                key = steps.probe_key(declared, options, inputs, samples) if ready else None
                label = " – ".join(subject)
                what, _ = state(name, label, seed, key)
                after = "" if ready else ", after its training"
                found.append((f"{name} {label} seed {seed}", what + after))
    return found


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
        if outcome.rows:
            reports.log(opened, reports.report(setting))
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
                found = registry.fetch(done.address, device=place, trusted=trusted)
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
    same = [(a, b) for a, b in combinations(points, 2) if a[0].seed == b[0].seed]
    rows = [Row(f"{a.optimizer} – {b.optimizer}", a.seed) for (a, _), (b, _) in same]
    for name in setting.pairs:
        options = setting.options(probe.find(name))
        for row, ((_, a), (_, b)) in zip(rows, same, strict=True):
            label = f"{name} {row.optimizer} seed {row.seed}"

            def step(name: Any = name, a: Any = a, b: Any = b, options: Any = options) -> Step:
                return steps.measure(name, a, b, reuse=True, **options)

            done = _attempt(label, step, outcome, say)
            if done:
                row.metrics.update(done.metrics)
    outcome.pairs += [row for row in rows if row.metrics]


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


@dataclass(frozen=True)
class Table:
    """The headline numbers of one probe (or of the training), one row per checkpoint or pair."""

    title: str
    headings: list[str]
    cells: list[list[str]]


def tables(outcome: Outcome) -> list[Table]:
    """Accuracy, then each probe's headline numbers; ± is two standard errors of each source."""
    accuracy = {"val accuracy": "final/val_accuracy", "train loss": "final/train_loss"}
    found = [_table("training", accuracy, outcome.rows)]
    for name in probe.modules():
        declared = probe.find(name)
        rows = outcome.pairs if declared.pair else outcome.rows
        keys = {metric: f"{name}/{metric}" for metric in declared.headline}
        known = {h: k for h, k in keys.items() if any(k in row.metrics for row in rows)}
        if known:
            found.append(_table(name, known, rows))
    return [table for table in found if table.cells]


def _table(title: str, keys: dict[str, str], rows: list[Row]) -> Table:
    cells = [
        [row.optimizer, str(row.seed), *(written([row.metrics], key) for key in keys.values())]
        for row in rows
    ]
    return Table(title, ["optimizer", "seed", *keys], cells)

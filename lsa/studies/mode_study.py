"""The mode graph measured: a study of pair probes, and the graph of all that they found.

It is no probe itself: every pair is a run of `interpolation` and one of `auto_neb`. So pairs that
another study has measured are reused, pairs run side by side in workers, a graph that was stopped
goes on, and another seed adds its own pairs alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pydantic

from lsa.figures import draw
from lsa.probe import Result
from lsa.project import Project
from lsa.project.factories import nearest
from lsa.reports.artifacts import StoredCurve, artifacts
from lsa.runtime.errors import InputError
from lsa.studies.handle import Handle
from lsa.studies.mode_graph import NAME, Pair, Stored, graph
from lsa.studies.plan import Planned
from lsa.studies.schedule import Study
from lsa.tracking import recording, results, runs
from lsa.tracking.numbers import flat

STEPS = ("interpolation", "auto_neb")


class _Number(pydantic.BaseModel):
    value: float
    unit: str = ""
    standard_errors: dict[str, float] = {}


class _Curve(StoredCurve):
    y_standard_error: list[float] | None = None


class _Stored(pydantic.BaseModel):
    """A pair probe's JSON artifact, as far as the graph needs it."""

    metrics: dict[str, _Number]
    curves: dict[str, _Curve]


def run(
    setting: Project, study: Study, *, optimizers: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Result | None:
    """Measure every pair of a project's final checkpoints in a study, and log the graph on its run.

    Args:
        setting: The project; its `pairs:` give the options of both probes.
        study: Runs what is missing, trainings included.
        optimizers: Of these alone.
        seeds: Of these in place of the project's.

    Returns:
        The graph of what could be measured; None where that is nothing.

    Raises:
        InputError: Fewer than two checkpoints, or an optimizer that the project does not name.
    """
    subjects = _subjects(setting, optimizers, seeds)
    trained = [study.step("train", optimizer=name, seed=seed) for name, seed in subjects]
    asked = {
        (a, b): {step: study.step(step, trained[a], trained[b]) for step in STEPS}
        for a, b in combinations(range(len(subjects)), 2)
    }
    study.advance()
    pairs = _read(asked)
    if not pairs:
        return None
    result = graph([f"{name} s{seed}" for name, seed in subjects], pairs)
    if study.opened:
        log(study.opened, result, f"{setting.name}: mode graph")
    return result


def planned(
    setting: Project, *, optimizers: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Planned]:
    """The steps of `run` with the same options.

    Raises:
        InputError: As `run`.
    """
    subjects = _subjects(setting, optimizers, seeds)
    trainings = [Planned("train", (name,), seed) for name, seed in subjects]
    pairs = [
        Planned(step, (a, b), seed, seed_b)
        for (a, seed), (b, seed_b) in combinations(subjects, 2)
        for step in STEPS
    ]
    return [*trainings, *pairs]


def _subjects(
    setting: Project, optimizers: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, int]]:
    for name in optimizers:
        if name not in setting.optimizers:
            raise InputError(
                f"unknown optimizer {name!r}; project {setting.name} names "
                f"{', '.join(setting.optimizers)}.{nearest(name, setting.optimizers)}"
            )
    # In the project's order, so that a pair is asked for as the project's own study asks for it.
    chosen = [name for name in setting.optimizers if not optimizers or name in optimizers]
    subjects = [(name, seed) for name in chosen for seed in dict.fromkeys(seeds or setting.seeds)]
    if len(subjects) < 2:
        raise InputError(
            f"a mode graph of {len(subjects)} checkpoint(s) has no pair; give more "
            "optimizers or seeds"
        )
    return subjects


def _read(asked: Mapping[tuple[int, int], Mapping[str, Handle]]) -> list[Pair]:
    """The results of the steps that have finished."""
    done = [
        (pair, step, handle.run_id)
        for pair, handles in asked.items()
        for step, handle in handles.items()
        if handle.state in ("done", "reused")
    ]
    wanted = [(runs.read(run_id), f"{step}.json") for _, step, run_id in done]
    stored = artifacts(wanted, _Stored)
    by_pair: dict[tuple[int, int], dict[str, Stored]] = {}
    for (pair, step, _), content in zip(done, stored, strict=True):
        by_pair.setdefault(pair, {})[step] = content.model_dump()
    return [Pair(a, b, results) for (a, b), results in by_pair.items()]


def log(opened: recording.Run, result: Result, title: str) -> None:
    """Store the graph with its figure on a run."""
    opened.metrics(flat(NAME, result.metrics))
    opened.arrays(result.arrays)
    opened.json(result.to_dict(), f"{NAME}.json")
    about = "Barriers between all checkpoints of the project, and the tree of lowest passes."
    results.describe(opened, about, result.notes)
    for path, png in draw.pictures(NAME, result, title).items():
        opened.picture(png, path)

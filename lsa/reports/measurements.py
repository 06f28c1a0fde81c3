"""What a project has measured, read back from the tracking store alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsa import probe, project
from lsa.project import TRAJECTORY, Project
from lsa.runtime.errors import InputError
from lsa.tracking import runs, store
from lsa.tracking.metric_histories import metric_histories
from lsa.tracking.runs import Done

OF_TRAINING = {"final", "train", "val"}  # what a training logs; the rest is what probes found there
# What tells two measurements of one kind apart although they may be compared.
IDENTITY = {"optimizer", "seed", "checkpoint", "optimizer_b", "seed_b", "checkpoint_b"}


@dataclass(frozen=True)
class Measurement:
    """The newest finished run of a step on one checkpoint or pair."""

    step: str  # "train" or the probe
    subject: str  # the optimizer, or both of a pair
    seed: int
    done: Done

    @property
    def numbers(self) -> dict[str, float]:
        """Full name → value, those that are not finite included.

        Of a training without what probes have measured on its checkpoint.
        """
        known = {**self.done.metrics, **runs.not_finite(self.done.tags)}
        if self.step != "train":
            return known
        return {name: v for name, v in known.items() if name.partition("/")[0] in OF_TRAINING}

    @property
    def converged(self) -> bool:
        """Whether the step converged."""
        return self.done.metrics.get(f"{self.step}/converged", 1.0) == 1.0


def measured(setting: Project) -> list[Measurement]:
    """The project's measurements, in the order of its optimizers, then seeds.

    Raises:
        InputError: There is none.
    """
    known = newest(setting)
    if not known:
        raise nothing_measured(setting)
    return known


def nothing_measured(setting: Project) -> InputError:
    """The error for a project without a measurement."""
    return InputError(
        f"nothing of project {setting.name} is measured in {store.uri()} as its file says now; run "
        f"lsa study {setting.reference}"
    )


def newest(setting: Project, done: Sequence[Done] | None = None) -> list[Measurement]:
    """The project's measurements, like `measured`; an empty list if there are none.

    A training counts if its options are the project's as the file gives them now. A probe counts if
    it measured a training that counts; of those that the project lists with its options, samples
    and random numbers. So neither a run that somebody started by hand with another rate nor one of
    an earlier state of the file is part of a comparison.

    Args:
        setting: The project.
        done: Its finished steps, the newest first, where they have been read already.
    """
    done = list(runs.finished_steps(setting.name)) if done is None else done
    trainings: dict[tuple[str, int], Measurement] = {}
    for run in done:
        if run.tags["lsa.step"] == "train" and _as_given(setting, run):
            optimizer, seed = run.tags["optimizer"], int(run.tags["seed"])
            measurement = Measurement("train", optimizer, seed, run)
            trainings.setdefault((optimizer, seed), measurement)
    latest = {(m.subject, m.seed, "train"): m for m in trainings.values()}
    for run, of in _on_trainings(setting, done, trainings.values()):
        if len({m.seed for m in of}) == 1:
            step, subject = run.tags["lsa.step"], " – ".join(m.subject for m in of)
            measurement = Measurement(step, subject, of[0].seed, run)
            latest.setdefault((subject, measurement.seed, step), measurement)
    order = {name: i for i, name in enumerate(setting.optimizers)}

    def position(key: tuple[str, int, str]) -> tuple[Any, ...]:
        subject, seed, step = key
        return [order[name] for name in subject.split(" – ")], step, seed

    return [latest[key] for key in sorted(latest, key=position)]


def between(
    setting: Project, done: Sequence[Done], trainings: Iterable[Measurement]
) -> list[tuple[Measurement, Measurement, Measurement]]:
    """The newest run of each step on each pair of trainings, of any two seeds.

    Args:
        setting: The project.
        done: Its finished steps, the newest first.
        trainings: The trainings that count.

    Returns:
        Triples of the run and its two trainings.
    """
    latest: dict[tuple[str, ...], tuple[Measurement, Measurement, Measurement]] = {}
    for run, of in _on_trainings(setting, done, trainings):
        if len(of) == 2:
            a, b = of
            subject = f"{a.subject} – {b.subject}"
            measurement = Measurement(run.tags["lsa.step"], subject, a.seed, run)
            key = (measurement.step, a.done.run_id, b.done.run_id)
            latest.setdefault(key, (measurement, a, b))
    return list(latest.values())


def _on_trainings(
    setting: Project, done: Iterable[Done], trainings: Iterable[Measurement]
) -> Iterator[tuple[Done, list[Measurement]]]:
    """Runs of probes as the project has them, with the trainings that they measured, one or two."""
    known = {m.done.run_id: m for m in trainings}
    options = functools.cache(functools.partial(_options, setting))
    samples = str(setting.landscape.samples)
    for run in done:
        wanted = options(run.tags["lsa.step"])
        listed = wanted is not None
        if listed and not (_agree(run, wanted) and run.tags.get(runs.SAMPLES, samples) == samples):
            continue
        if "checkpoint_c" in run.params:
            continue  # what was measured of three checkpoints is of neither one nor a pair
        ids = [run.params[k] for k in ("checkpoint", "checkpoint_b") if k in run.params]
        of = [known[run_id] for run_id in ids if run_id in known]
        if ids and len(of) == len(ids):
            yield run, of


def _as_given(setting: Project, run: Done) -> bool:
    """Whether a training has the options that the project gives now.

    Of trainings by other code and of earlier versions, only the parameters are known.
    """
    optimizer, seed = run.tags.get("optimizer", ""), int(run.tags.get("seed", "-1"))
    if optimizer not in setting.optimizers or seed not in setting.seeds:
        return False
    recipe = setting.recipe(optimizer, seed)
    wanted = project.train_params(recipe)
    if "optimizer.name" in run.params:  # one option more or less is another optimizer
        given = {name for name in run.params if name.startswith("optimizer.")}
        if given != {name for name in wanted if name.startswith("optimizer.")}:
            return False
    form = project.form(recipe)
    return _agree(run, wanted) and run.tags.get(runs.FORM, form) == form


def _options(setting: Project, step: str) -> Mapping[str, object] | None:
    """What a study gives to a probe; None of one that it does not list: any will do."""
    name = step.removeprefix(TRAJECTORY)
    sections = [setting.trajectory] if name != step else [setting.probes, setting.pairs]
    if not any(name in section for section in sections):
        return None
    return {**setting.options(probe.find(name), trajectory=name != step), "rng_seed": 0}


def _agree(run: Done, wanted: Mapping[str, object]) -> bool:
    return all(_same(run.params[k], v) for k, v in wanted.items() if k in run.params)


def _same(logged: str, value: object) -> bool:
    """Equal as text or as numbers: `mlflow run` logs what was typed."""
    try:
        return logged == str(value) or float(logged) == float(str(value))
    except ValueError:
        return False


def step_of(metric: str) -> str:
    """The step that logs a number of that full name."""
    return "train" if metric.startswith("final/") else metric.partition("/")[0]


def values(measurements: Sequence[Measurement], metric: str) -> dict[str, dict[int, float]]:
    """Subject → seed → one number, of the step that its name says."""
    step = step_of(metric)
    by_subject: dict[str, dict[int, float]] = {}
    for m in measurements:
        if m.step == step and metric in m.numbers:
            by_subject.setdefault(m.subject, {})[m.seed] = m.numbers[metric]
    return by_subject


def histories(
    measurements: Sequence[Measurement], metric: str
) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """Optimizer → seed → (epoch, value) of a number that training logs every epoch."""
    trainings = [m for m in measurements if m.step == "train"]
    logged = metric_histories([m.done.run_id for m in trainings], metric)
    by_subject: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for m in trainings:
        by_subject.setdefault(m.subject, {})[m.seed] = sorted(logged[m.done.run_id].items())
    return by_subject


def check_alike(step: str, runs: list[Done]) -> None:
    """Refuse to compare what was measured in different ways.

    Raises:
        InputError: Two runs of a probe differ in an option or in the number of samples.
    """
    if step == "train":  # optimizers differ there by intent
        return
    settings = [{k: v for k, v in run.params.items() if k not in IDENTITY} for run in runs]
    for setting in settings[1:]:
        first = settings[0]
        differing = sorted(
            k for k in setting.keys() | first.keys() if setting.get(k) != first.get(k)
        )
        if differing:
            name = differing[0]
            raise InputError(
                f"{step} was measured with {name}={first.get(name)} and with "
                f"{name}={setting.get(name)}; measure all alike again, or list {step} in the "
                "project and run lsa study"
            )

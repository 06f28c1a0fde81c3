"""What a project has measured, read back from the tracking store alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lsa import tracking
from lsa.errors import InputError
from lsa.project import Project
from lsa.tracking import Done

FETCHERS = 8  # artifacts asked for at once
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
        """Full name → value, those that are not finite included."""
        return {**self.done.metrics, **tracking.not_finite(self.done.tags)}


def measured(setting: Project) -> list[Measurement]:
    """The project's measurements, in the order of its optimizers, then seeds.

    Raises:
        InputError: There is none.
    """
    found = newest(setting)
    if not found:
        raise InputError(
            f"nothing of project {setting.name} is measured in {tracking.store()}; run lsa study "
            f"{setting.name}"
        )
    return found


def newest(setting: Project) -> list[Measurement]:
    """The same, or nothing."""
    order = list(setting.optimizers)
    found: dict[tuple[int, ...], dict[tuple[str, int], Measurement]] = {}
    for done in tracking.finished_steps(setting.name):
        tags, params = done.tags, done.params
        names = [tags.get("optimizer", "")]
        if "lsa.input.b" in tags:
            names.append(params.get("optimizer_b", ""))
            if params.get("seed_b") != tags.get("seed"):
                continue  # not one of a study's pairs
        if not all(name in order for name in names) or int(tags["seed"]) not in setting.seeds:
            continue
        step, seed = tags["lsa.step"], int(tags["seed"])
        one = Measurement(step, " – ".join(names), seed, done)
        found.setdefault(tuple(map(order.index, names)), {}).setdefault((step, seed), one)
    return [group[key] for _, group in sorted(found.items()) for key in sorted(group)]


def values(measurements: Sequence[Measurement], metric: str) -> dict[str, dict[int, float]]:
    """Subject → seed → one number, of the step that its name says."""
    step = "train" if metric.startswith("final/") else metric.partition("/")[0]
    found: dict[str, dict[int, float]] = {}
    for m in measurements:
        if m.step == step and metric in m.numbers:
            found.setdefault(m.subject, {})[m.seed] = m.numbers[metric]
    return found


@dataclass(frozen=True)
class Trajectory:
    """A probe along one training run: `trajectory.json` of a step `trajectory.<probe>`."""

    probe: str
    subject: str
    seed: int
    epochs: list[float]
    train_loss: list[float]
    metrics: Mapping[str, list[float]]  # one value per epoch
    threshold: float = math.nan  # λ_max above which training is unstable, where there is one
    formula: str = ""  # of the threshold


def trajectories(measurements: Sequence[Measurement]) -> list[Trajectory]:
    """Every trajectory that the project has measured."""
    steps = [m for m in measurements if m.step.startswith("trajectory.")]
    found = artifacts([(m.done.run_id, "trajectory.json") for m in steps])
    return [_trajectory(m, stored) for m, stored in zip(steps, found, strict=True)]


def _trajectory(m: Measurement, stored: dict) -> Trajectory:
    threshold = stored.get("threshold") or {}
    return Trajectory(
        probe=m.step.partition(".")[2],
        subject=m.subject,
        seed=m.seed,
        epochs=[float(v) for v in stored["epochs"]],
        train_loss=[float(v) for v in stored["train_loss"]],
        metrics={k: [float(v) for v in s["value"]] for k, s in stored["metrics"].items()},
        threshold=float(threshold.get("value", math.nan)),
        formula=str(threshold.get("formula", "")),
    )


def artifacts(wanted: Sequence[tuple[str, str]]) -> list:
    """JSON artifacts by run and path, fetched several at a time: a server answers each slowly."""
    with ThreadPoolExecutor(FETCHERS) as pool:
        return list(pool.map(lambda one: tracking.artifact(*one), wanted))


def histories(
    measurements: Sequence[Measurement], metric: str
) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """Optimizer → seed → (epoch, value) of a number that training logs every epoch."""
    runs = [m for m in measurements if m.step == "train"]
    found: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for m in runs:
        logged = tracking.client().get_metric_history(m.done.run_id, metric)
        by_epoch = {one.step: one.value for one in logged}
        found.setdefault(m.subject, {})[m.seed] = sorted(by_epoch.items())
    return found


@dataclass(frozen=True)
class Origin:
    """Where a run stands in the store, and the data that it measured."""

    experiment: str
    data: str  # digest; empty where the run names none


def origins(setting: Project) -> dict[str, Origin]:
    """Run → origin, of every finished run of the project."""
    client = tracking.client()
    experiments = [one.experiment_id for one in client.search_experiments()]
    criteria = f"tags.project = '{setting.name}' and attributes.status = 'FINISHED'"
    found, token = {}, None
    while True:
        page = client.search_runs(experiments, criteria, max_results=1000, page_token=token)
        for run in page:
            inputs = run.inputs.dataset_inputs if run.inputs else []
            data = ", ".join(dict.fromkeys(one.dataset.digest for one in inputs))
            found[run.info.run_id] = Origin(run.info.experiment_id, data)
        token = page.token
        if not token:
            return found


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
                f"{name}={setting.get(name)}; run lsa study to measure all alike"
            )


def written(runs: Sequence[Mapping[str, float]], name: str) -> str:
    """A number of one checkpoint or pair, over its seeds, with what is known of its error.

    Mean ± half the 95 % t interval over several seeds, or their median where not all are finite; of
    one seed, its own interval where it has one, else ± two standard errors of each source.
    """
    values = [run[name] for run in runs if name in run]
    if not values:
        return "–"
    if len(values) > 1:
        finite = int(np.isfinite(values).sum())
        if finite < len(values):
            return f"median {np.median(values):.4g} ({finite} of {len(values)} finite)"
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        return f"{np.mean(values):.4g} ± {_rounded(half)}"
    low, high = (runs[0].get(f"{name}_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        return f"{values[0]:.4g} ({low:.4g} … {high:.4g})"
    errors = [error for key, error in runs[0].items() if key.startswith(f"{name}_se_")]
    return f"{values[0]:.4g}" + "".join(f" ± {_rounded(2 * error)}" for error in errors)


def _rounded(error: float) -> str:
    """Two digits, without an exponent where a reader would not write one."""
    return f"{float(f'{error:.2g}'):g}"

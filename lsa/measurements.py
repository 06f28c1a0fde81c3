"""What a project has measured, read back from the tracking store alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lsa import tracking
from lsa.errors import InputError
from lsa.project import Project
from lsa.tracking import Done

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


def newest(setting: Project, finished: Iterable[Done] | None = None) -> list[Measurement]:
    """The same, or nothing; of finished runs, newest first, where those were read before."""
    order = list(setting.optimizers)
    found: dict[tuple[int, ...], dict[tuple[str, int], Measurement]] = {}
    for done in tracking.finished_steps(setting.name) if finished is None else finished:
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

    Mean ± half the 95 % t interval over several seeds; of one seed, its own interval where it has
    one, else ± two standard errors of each source.
    """
    values = [run[name] for run in runs if name in run]
    if not values:
        return "–"
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        return f"{np.mean(values):.4g} ± {half:.2g}"
    low, high = (runs[0].get(f"{name}_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        return f"{values[0]:.4g} ({low:.4g} … {high:.4g})"
    errors = [error for key, error in runs[0].items() if key.startswith(f"{name}_se_")]
    return f"{values[0]:.4g}" + "".join(f" ± {2 * error:.2g}" for error in errors)

"""Claims that are often made about optimizers, each as a rule over a project's measurements.

A claim about classes of optimizers is established only if it holds for every pair of one of each
class, by its own exact test over the seeds. The largest p of the pairs is then the claim's, so no
adjustment is due (intersection–union test, Berger 1982): at most 5 % of studies claim it where, in
some pair, both optimizers have the same distribution over the seeds. That is what the sign-flip
test is exact for. With equal means and unequal, skewed distributions it is 9 to 11 % (simulated).
The class of an optimizer is read from its recipe in the project, never from the name that it has
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lsa.project import Named, Project
from lsa.reports import doubts
from lsa.reports.artifacts import Trajectory
from lsa.reports.extent import extent
from lsa.reports.findings import match
from lsa.reports.measurements import Measurement, step_of, values
from lsa.reports.statistics.comparison import FEWEST, Comparison, Scale, compare
from lsa.reports.statistics.levels import levels

Kind = Literal["adaptive", "momentum", "plain", "other"]
ADAPTIVE = {
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam", "RMSprop", "Adagrad", "Adadelta",
    "Adafactor",
}  # fmt: skip
SHARE = 0.9  # of the lowest final accuracy, from which a training counts as converged
BySeed = Mapping[str, Mapping[int, float]]
Histories = Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]  # (epoch, accuracy)


@dataclass(frozen=True)
class Insight:
    """A claim, what speaks for or against it, and whether the project establishes it."""

    name: str
    claim: str  # the rule in plain words
    evidence: tuple[str, ...] = ()
    established: bool = False
    missing: str = ""  # what the project lacks to be asked at all

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.missing:
            return f"cannot be asked of this project: {self.missing}"
        return "established" if self.established else "not established"


def kind(rule: Named) -> Kind:
    """Whether an optimizer adapts its rate per parameter, is SGD with or without momentum.

    SAM, Muon, LBFGS and foreign classes are none of these.
    """
    if rule.name in ADAPTIVE:
        return "adaptive"
    if rule.name == "SGD":
        return "momentum" if rule.options.get("momentum") else "plain"
    return "other"


def insights(
    setting: Project,
    measurements: Sequence[Measurement],
    trajectories: Sequence[Trajectory],
    accuracy_by_epoch: Histories,
) -> list[Insight]:
    """The five claims of the reference study, tested on a project.

    The claim that plain SGD is the noisiest has two meanings in the reference, and both are tested:
    the top eigenvalue λ_C of the gradient noise, and its ratio to λ_H.

    Args:
        setting: The project.
        measurements: Of the project.
        trajectories: Of the project.
        accuracy_by_epoch: Optimizer → seed → (epoch, validation accuracy).
    """
    trained = extent(measurements).optimizers
    of: dict[str, Kind] = {name: kind(setting.optimizers[name]) for name in trained}
    accuracy = values(measurements, "final/val_accuracy")
    return [
        adaptive_rates_win(of, accuracy),
        momentum_flattens(setting, of, measurements, trajectories),
        sgd_is_noisiest("lambda_c", of, measurements, trajectories),
        sgd_is_noisiest("noise_ratio", of, measurements, trajectories),
        early_convergence(of, accuracy, accuracy_by_epoch),
        indefinite_hessians(
            values(measurements, "lanczos/lambda_min"),
            values(measurements, "lanczos/lambda_min_se_data"),
            values(measurements, "lanczos/lambda_min_residual"),
        ),
    ]


# --- classes of optimizers ------------------------------------------------------------------------


def above(
    numbers: BySeed, larger: Sequence[str], smaller: Sequence[str], scale: Scale
) -> tuple[list[Comparison], bool]:
    """Compare each optimizer of one class with each of another.

    Args:
        numbers: Optimizer → seed → value.
        larger: Optimizers of the class that the claim calls larger.
        smaller: Those of the other class.
        scale: Of the differences.

    Returns:
        The comparisons, and whether all of them establish that the first class is larger.
    """
    pairs = [
        compare({a: numbers[a], b: numbers[b]}, scale=scale)[0] for a in larger for b in smaller
    ]
    return pairs, all(c.established and c.larger == c.a for c in pairs)


def _measured(of: Mapping[str, Kind], kinds: set[Kind], numbers: Mapping[str, object]) -> list[str]:
    return [name for name, kind in of.items() if kind in kinds and name in numbers]


def _lacking(classes: Mapping[str, Sequence[str]]) -> str:
    """Names of the classes of optimizers that the project has not measured."""
    none = [name for name, members in classes.items() if not members]
    return f"it has no measured {' and no '.join(none)}" if none else ""


def _left_out(of: Mapping[str, Kind]) -> tuple[str, ...]:
    others = [name for name, kind in of.items() if kind == "other"]
    return (f"left out, of neither class: {', '.join(others)}",) if others else ()


# --- the claims -----------------------------------------------------------------------------------


def adaptive_rates_win(of: Mapping[str, Kind], accuracy: BySeed) -> Insight:
    """Validation accuracy after the last epoch, every adaptive optimizer against every SGD."""
    name = "Adaptive rates win"
    claim = (
        "Every optimizer with adaptive rates reaches a higher validation accuracy than every SGD, "
        "with or without momentum."
    )
    adaptive = _measured(of, {"adaptive"}, accuracy)
    others = _measured(of, {"momentum", "plain"}, accuracy)
    if missing := _lacking({"adaptive optimizer": adaptive, "SGD": others}):
        return Insight(name, claim, missing=missing)
    pairs, holds = above(accuracy, adaptive, others, "difference")
    evidence = ("val accuracy: " + c.verdict for c in pairs)
    return Insight(name, claim, (*evidence, *_left_out(of)), holds)


def momentum_flattens(
    setting: Project,
    of: Mapping[str, Kind],
    measurements: Sequence[Measurement],
    trajectories: Sequence[Trajectory],
) -> Insight:
    """λ_max of SGD with momentum against SGD without, at the last epoch and at equal train loss."""
    name = "Momentum flattens"
    claim = (
        "SGD with momentum ends at a lower λ_max than SGD without, at the same epoch and at the "
        "same train loss. (λ_max of one network changes when its layers are rescaled without "
        "changing its function, so this is about λ_max and not about flatness as such.)"
    )
    sharpness = values(measurements, "lanczos/lambda_max")
    heavy = _measured(of, {"momentum"}, sharpness)
    plain = _measured(of, {"plain"}, sharpness)
    if missing := _lacking({"λ_max of SGD with momentum": heavy, "λ_max of plain SGD": plain}):
        return Insight(name, claim, missing=missing)
    pairs, holds = above(sharpness, plain, heavy, "ratio")
    steps = ", ".join(f"{n} {_effective_rate(setting, n)}" for n in (*plain, *heavy))
    beside, same = _at_equal_loss("lanczos/lambda_max", "λ_max", pairs, measurements, trajectories)
    evidence = (f"effective step lr/(1 − momentum): {steps}", *beside)
    return Insight(name, claim, evidence, holds and same)


def _at_equal_loss(
    metric: str,
    symbol: str,
    pairs: Sequence[Comparison],
    measurements: Sequence[Measurement],
    trajectories: Sequence[Trajectory],
) -> tuple[list[str], bool]:
    """Each pair at the last epoch and at equal train loss; whether the latter establishes a > b."""
    evidence, holds = [], True
    for c in pairs:
        matching = match(metric, [c.a, c.b], measurements, trajectories)
        matched = matching.of(c.a, c.b)
        where = "" if matched is None else " at equal train loss"
        verdict = "" if matched is None else f": {matched.finding}"
        evidence += [
            f"{symbol} at the last epoch: {c.verdict}",
            f"{symbol}{where}: {matching.said(matched)}{verdict}",
        ]
        doubt = doubts.of(step_of(metric), measurements, (c.a, c.b))
        evidence += [f"{symbol}: {doubt}"] if doubt else []
        holds = holds and matched is not None and matched.established and matched.larger == c.a
    return evidence, holds


def _effective_rate(setting: Project, name: str) -> str:
    options = setting.optimizers[name].options
    try:
        return f"{float(options['lr']) / (1 - float(options.get('momentum', 0))):.3g}"
    except (KeyError, ValueError, ZeroDivisionError):
        return "unknown"


NOISE = {  # metric of sgd_noise -> its symbol, and how noise is meant by it
    "lambda_c": ("λ_C", "by λ_C"),
    "noise_ratio": ("λ_C/λ_H", "relative to the curvature"),
}


def sgd_is_noisiest(
    metric: str,
    of: Mapping[str, Kind],
    measurements: Sequence[Measurement],
    trajectories: Sequence[Trajectory],
) -> Insight:
    """Plain SGD against every other optimizer in a measure of gradient noise.

    Per-sample gradients shrink with the loss, so the measure is compared at equal train loss too.
    """
    symbol, how = NOISE[metric]
    name = f"SGD is noisiest {how}"
    claim = (
        f"Plain SGD ends at a larger {symbol} than every other optimizer, at the same epoch and at "
        "the same train loss."
    )
    key = f"sgd_noise/{metric}"
    numbers = values(measurements, key)
    plain = _measured(of, {"plain"}, numbers)
    others = _measured(of, {"adaptive", "momentum", "other"}, numbers)
    lacking = {f"{symbol} of plain SGD": plain, f"{symbol} of another optimizer": others}
    if missing := _lacking(lacking):
        return Insight(name, claim, missing=missing)
    pairs, holds = above(numbers, plain, others, "ratio")
    evidence, same = _at_equal_loss(key, symbol, pairs, measurements, trajectories)
    return Insight(name, claim, tuple(evidence), holds and same)


def epochs_to(history: Sequence[tuple[int, float]], accuracy: float) -> float:
    """The first epoch at which an accuracy is reached; inf when it never is."""
    return next((float(epoch) for epoch, value in history if value >= accuracy), float("inf"))


def early_convergence(of: Mapping[str, Kind], accuracy: BySeed, history: Histories) -> Insight:
    """Epochs to a common accuracy, every adaptive optimizer against every SGD."""
    name = "Early convergence"
    claim = (
        "Every optimizer with adaptive rates needs fewer epochs than every SGD to reach "
        f"{100 * SHARE:.0f} % of the lowest final validation accuracy among the optimizers of "
        "that seed."
    )
    adaptive = _measured(of, {"adaptive"}, history)
    others = _measured(of, {"momentum", "plain"}, history)
    if missing := _lacking({"adaptive optimizer": adaptive, "SGD": others}):
        return Insight(name, claim, missing=missing)
    lowest: dict[int, float] = {}
    for by_seed in accuracy.values():
        for seed, value in by_seed.items():
            lowest[seed] = min(value, lowest.get(seed, value))
    epochs = {
        name: {s: epochs_to(h, SHARE * lowest[s]) for s, h in history[name].items() if s in lowest}
        for name in (*adaptive, *others)
    }
    pairs, holds = above(epochs, others, adaptive, "difference")
    evidence = ("epochs: " + c.verdict for c in pairs)
    return Insight(name, claim, (*evidence, *_left_out(of)), holds)


def indefinite_hessians(lambda_min: BySeed, errors: BySeed, residuals: BySeed) -> Insight:
    """Whether λ_min is below 0 by more than its errors at every checkpoint."""
    name = "Indefinite Hessians"
    claim = (
        "At the end of training the Hessian has a negative eigenvalue at every checkpoint: λ_min, "
        "two standard errors over the data and the Lanczos residual together are below 0. "
        "(On a subset of the data λ_min is biased down.)"
    )
    if not lambda_min:
        return Insight(name, claim, missing="it has no measured λ_min")
    beyond = {
        optimizer: {
            seed: 2 * errors.get(optimizer, {}).get(seed, math.nan)
            + residuals.get(optimizer, {}).get(seed, 0.0)
            for seed in by_seed
        }
        for optimizer, by_seed in lambda_min.items()
    }
    judged = [levels({name: lambda_min[name]}, beyond, side="below 0")[0] for name in lambda_min]
    held = [level.established and level.every for level in judged]
    evidence = [
        f"λ_min of {level.statement}: {'established' if holds else 'not established'}"
        for level, holds in zip(judged, held, strict=True)
    ]
    if any(len(level.seeds) < FEWEST for level in judged):
        evidence.append(f"with fewer than {FEWEST} seeds nothing is established of an optimizer")
    return Insight(name, claim, tuple(evidence), all(held))

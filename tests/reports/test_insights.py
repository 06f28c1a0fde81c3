"""The claims about optimizers: their rules on studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lsa.project import Named, Project
from lsa.reports.artifacts import Trajectory
from lsa.reports.insights import (
    Insight,
    above,
    adaptive_rates_win,
    early_convergence,
    epochs_to,
    indefinite_hessians,
    insights,
    kind,
    momentum_flattens,
    sgd_is_noisiest,
)
from lsa.reports.measurements import Measurement
from lsa.tracking.runs import Done

KINDS = {"sgd": "plain", "heavy": "momentum", "adamw": "adaptive"}
SEEDS = range(8)


def project(**optimizers: Named) -> Project:
    rules = optimizers or {
        "sgd": Named(name="SGD", lr=0.1),
        "heavy": Named(name="SGD", lr=0.01, momentum=0.9),
        "adamw": Named(name="AdamW", lr=0.001),
    }
    named = {"dataset": Named(name="digits"), "model": Named(name="mlp")}
    return Project(name="synthetic", optimizers=rules, seeds=list(SEEDS), **named)


def numbers(**levels: float) -> dict[str, dict[int, float]]:
    """Every optimizer at its level, at every seed a little off it."""
    return {
        name: {seed: level * (1 + 0.01 * seed) for seed in SEEDS} for name, level in levels.items()
    }


def measurements(metric: str, step: str, of: dict[str, dict[int, float]]) -> list[Measurement]:
    return [
        Measurement(step, name, seed, Done(f"{step}-{name}-{seed}", {metric: value}, {}, {}))
        for name, by_seed in of.items()
        for seed, value in by_seed.items()
    ]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Named(name="RMSprop"), "adaptive"),
        (Named(name="NAdam"), "adaptive"),
        (Named(name="SGD"), "plain"),
        (Named(name="SGD", momentum=0.0), "plain"),
        (Named(name="SGD", momentum=0.9, nesterov=True), "momentum"),
        (Named(name="SAM"), "other"),
        (Named(name="my.optim:Adam"), "other"),
    ],
)
def test_the_kind_is_that_of_the_class_and_its_options(rule, expected):
    assert kind(rule) == expected


def test_the_name_in_the_project_does_not_count():
    setting = project(adam=Named(name="SGD"), sgd=Named(name="Adam"))
    accuracy = measurements("final/val_accuracy", "train", numbers(adam=0.8, sgd=0.9))
    (claim, *_) = insights(setting, accuracy, [], {})
    assert claim.established and "sgd − adam" in claim.evidence[0]


# --- each claim: where it holds, where it does not, where it cannot be asked ----------------------


def test_adaptive_rates_win_only_over_every_sgd():
    win = adaptive_rates_win(KINDS, numbers(sgd=0.6, heavy=0.7, adamw=0.8))
    assert win.established and win.verdict == "established"
    tie = adaptive_rates_win(KINDS, numbers(sgd=0.6, heavy=0.8, adamw=0.8))
    assert not tie.established and "established, larger for adamw" in tie.evidence[0]
    lose = adaptive_rates_win(KINDS, numbers(sgd=0.6, heavy=0.9, adamw=0.8))
    assert not lose.established and "established, larger for heavy" in lose.evidence[1]


def test_what_a_project_lacks_is_named():
    alone = adaptive_rates_win({"sgd": "plain"}, numbers(sgd=0.6))
    assert alone.verdict == (
        "cannot be asked of this project: it has no measured adaptive optimizer"
    )
    for claim in insights(project(), [], [], {}):
        assert claim.verdict.startswith("cannot be asked of this project"), claim.name


def test_optimizers_of_neither_class_are_left_out_aloud():
    found = adaptive_rates_win({**KINDS, "muon": "other"}, numbers(sgd=0.6, heavy=0.7, adamw=0.8))
    assert found.established and found.evidence[-1].endswith("muon")


def courses(losses: dict[str, float], scales: dict[str, float]) -> list[Trajectory]:
    """λ = scale · L^½ along trainings that all begin at the loss 2."""
    found = []
    for name, last in losses.items():
        for seed in SEEDS:
            loss = np.geomspace(2, last * (1 + 0.01 * seed), 12)
            sharpness = scales[name] * np.sqrt(loss)
            values = {"lambda_max": sharpness.tolist()}
            epochs = list(range(1, 13))
            found.append(Trajectory("lanczos", name, seed, epochs, loss.tolist(), values))
    return found


def flattens(losses: dict[str, float], scales: dict[str, float], along: bool = True) -> Insight:
    runs = courses(losses, scales)
    last: dict[str, dict[int, float]] = {}
    loss: dict[str, dict[int, float]] = {}
    for run in runs:
        last.setdefault(run.subject, {})[run.seed] = run.metrics["lambda_max"][-1]
        loss.setdefault(run.subject, {})[run.seed] = run.train_loss[-1]
    found = measurements("lanczos/lambda_max", "lanczos", last)
    found += measurements("final/train_loss", "train", loss)
    kinds = {name: KINDS[name] for name in losses}
    return momentum_flattens(project(), kinds, found, runs if along else [])


def test_momentum_flattens_when_it_does_so_at_equal_loss_too():
    found = flattens({"sgd": 0.2, "heavy": 0.02}, {"sgd": 20, "heavy": 10})
    assert found.established
    assert "effective step lr/(1 − momentum): sgd 0.1, heavy 0.1" in found.evidence


def test_momentum_that_only_trains_further_flattens_nothing():
    """The same λ(loss) for both: sharper at the last epoch, equal at equal loss."""
    found = flattens({"sgd": 0.2, "heavy": 0.02}, {"sgd": 10, "heavy": 10})
    assert "established, larger for sgd" in found.evidence[1]
    assert not found.established and found.evidence[2].endswith("not established")


def test_momentum_that_is_sharper_at_equal_loss_is_not_flatter():
    found = flattens({"sgd": 0.2, "heavy": 0.001}, {"sgd": 10, "heavy": 13})
    assert "established, larger for sgd" in found.evidence[1]
    assert "established, larger for heavy" in found.evidence[2] and not found.established


def test_without_trajectories_covariance_must_not_extrapolate():
    found = flattens({"sgd": 0.2, "heavy": 0.02}, {"sgd": 20, "heavy": 10}, along=False)
    assert not found.established and "by ANCOVA" in found.evidence[2]


def noisiest(
    metric: str, levels: dict[str, float], losses: dict[str, float] | None = None
) -> Insight:
    """noise = level · L at every epoch of trainings that end at these losses (all at 1)."""
    found, runs = [], []
    for name, level in levels.items():
        for seed in SEEDS:
            loss = np.geomspace(2, (losses or {}).get(name, 1.0), 12)
            noise = (level * (1 + 0.01 * seed) * loss).tolist()
            last = {name: {seed: noise[-1]}}
            found += measurements(f"sgd_noise/{metric}", "sgd_noise", last)
            epochs = list(range(1, 13))
            runs.append(Trajectory("sgd_noise", name, seed, epochs, loss.tolist(), {metric: noise}))
    return sgd_is_noisiest(metric, KINDS, found, runs)


def test_noise_and_noise_over_curvature_are_two_claims():
    """The reference study's numbers, in order; it claimed the second by the first."""
    absolute = noisiest("lambda_c", {"sgd": 358.3, "adamw": 266.3, "heavy": 135.4})
    relative = noisiest("noise_ratio", {"sgd": 2.77, "heavy": 3.60, "adamw": 1.52})
    assert absolute.established and not relative.established
    names = [claim.name for claim in insights(project(), [], [], {})]
    assert sum(name.startswith("SGD is noisiest") for name in names) == 2


def test_noise_that_only_follows_the_loss_is_no_ones_own():
    """The same noise at the same loss: larger for whoever has trained less far."""
    levels = {"sgd": 1.0, "heavy": 1.0, "adamw": 1.0}
    found = noisiest("lambda_c", levels, {"sgd": 0.5, "heavy": 0.05, "adamw": 0.05})
    assert "established, larger for sgd" in found.evidence[0]
    assert found.evidence[1].endswith("not established") and not found.established


def test_epochs_to_an_accuracy_count_from_one():
    history = [(1, 0.3), (2, 0.7), (3, 0.6), (4, 0.9)]
    assert [epochs_to(history, a) for a in (0.2, 0.7, 0.8, 0.95)] == [1, 2, 4, math.inf]


def test_early_convergence_counts_epochs_to_a_common_accuracy():
    """adamw reaches 90 % of sgd's final 0.5 at epoch 2, the others later; its own 90 % never."""
    curves = {
        "sgd": [0.1, 0.2, 0.3, 0.5],
        "heavy": [0.2, 0.3, 0.5, 0.6],
        "adamw": [0.2, 0.5, 0.6, 1],
    }
    history = {name: {s: list(enumerate(c, 1)) for s in SEEDS} for name, c in curves.items()}
    accuracy = {name: dict.fromkeys(SEEDS, c[-1]) for name, c in curves.items()}
    found = early_convergence(KINDS, accuracy, history)
    assert found.established
    assert "sgd − adamw = 2 " in found.evidence[0] and "heavy − adamw = 1 " in found.evidence[1]


def test_one_checkpoint_without_negative_curvature_refutes_it_everywhere():
    lambda_min = {name: dict.fromkeys(SEEDS, -1.0) for name in KINDS}
    errors = {name: dict.fromkeys(SEEDS, 0.3) for name in KINDS}
    residuals = {name: dict.fromkeys(SEEDS, 0.3) for name in KINDS}
    assert indefinite_hessians(lambda_min, errors, residuals).established
    residuals["adamw"][5] = 0.5  # −1 + 2·0.3 + 0.5 > 0
    found = indefinite_hessians(lambda_min, errors, residuals)
    assert not found.established and "at 7 of 8 seeds" in found.evidence[2]


def test_with_one_seed_nothing_is_established():
    one = {name: {0: value} for name, value in (("sgd", 0.6), ("heavy", 0.7), ("adamw", 0.8))}
    assert not adaptive_rates_win(KINDS, one).established
    assert "needs at least 6 seeds" in adaptive_rates_win(KINDS, one).evidence[0]
    found = indefinite_hessians({"sgd": {0: -9.0}}, {}, {})
    assert not found.established and "fewer than 6 seeds" in found.evidence[-1]


# --- how often the compound rule is wrong and right -----------------------------------------------


def claimed(rng: np.random.Generator, shifts: tuple[float, ...], n: int = 10) -> bool:
    """Whether a study claims that the first optimizer is above all others; d_z of each shift."""
    table = rng.normal(0, 1, (len(shifts), n)) / math.sqrt(2) + rng.normal(0, 1, n)
    values = {f"o{i}": dict(enumerate(row + s)) for i, (row, s) in enumerate(zip(table, shifts))}  # noqa: B905
    _, holds = above(values, ["o0"], list(values)[1:], "difference")
    return holds


@pytest.mark.parametrize("shifts", [(0, 0, 0), (0, 0), (5, 0, 5)])
def test_without_a_difference_to_some_pair_at_most_5_percent_claim_it(shifts):
    """Also where the first is far above one of two others and equal to the second."""
    rng = np.random.default_rng(0)
    wrong = sum(claimed(rng, shifts) for _ in range(2000))
    assert wrong <= 100 + 3 * math.sqrt(2000 * 0.05 * 0.95)


def test_with_a_difference_of_two_deviations_to_every_pair_most_claim_it():
    rng = np.random.default_rng(1)
    assert sum(claimed(rng, (2, 0, 0)) for _ in range(500)) >= 0.8 * 500


def test_an_indefinite_hessian_is_claimed_of_few_that_are_definite():
    """λ_min = 0 at every checkpoint, known with an error of 1."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(2000):
        measured = {name: dict(enumerate(rng.normal(0, 1, 10))) for name in KINDS}
        errors = {name: dict.fromkeys(range(10), 1.0) for name in KINDS}
        wrong += indefinite_hessians(measured, errors, {}).established
    assert wrong <= 100 + 3 * math.sqrt(2000 * 0.05 * 0.95)

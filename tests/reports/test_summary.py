"""What stands on a report's first screen, and what stands beside its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lsa.project import Named, Project
from lsa.reports import doubts, summary
from lsa.reports.extent import Extent, compared, extent
from lsa.reports.findings import ALONG, BY_ANCOVA, Finding, Matched
from lsa.reports.measurements import Measurement
from lsa.reports.statistics.comparison import compare
from lsa.reports.tables import cell, leading, tables
from lsa.tracking.runs import Done

SETTING = Project(
    name="p",
    dataset=Named(name="image_folder", root="/data/birds/", train_limit=600),
    model=Named(name="mlp"),
    optimizers={
        "sgd": Named(name="SGD", lr=0.1),
        "adamw": Named(name="AdamW", lr=0.01),
        "theirs": Named(name="elsewhere", checkpoints=["a", "b", "c"]),
    },
    seeds=[0, 1, 2],
)
SUBSET = "measured on 512 of 1437 training samples"


def lanczos(subject: str, seed: int, value: float, *, converged: bool = True) -> Measurement:
    numbers = {
        "lanczos/lambda_max": value,
        "lanczos/lambda_max_se_data": 0.1,
        "lanczos/lambda_max_residual": 0.05,
        "lanczos/converged": float(converged),
    }
    tags = {"lsa.note.0": SUBSET}
    if not converged:
        tags["lsa.note.1"] = "500 products were not enough"
    return Measurement("lanczos", subject, seed, Done(f"{subject}{seed}", numbers, {}, tags))


def test_a_number_that_has_not_converged_says_so_and_which_samples_it_is_of():
    runs = [lanczos("sgd", 0, 4.0), lanczos("sgd", 1, 6.0, converged=False)]
    assert cell(runs[:1], "lanczos/lambda_max") == "4 ± 0.2; residual 0.05"
    assert cell(runs, "lanczos/lambda_max").endswith("\nnot converged (seed 1)")
    assert cell(runs[1:], "lanczos/lambda_max").endswith("\nnot converged")
    assert doubts.of("lanczos", runs) == "not converged: sgd (seed 1)"
    assert doubts.of("lanczos", runs, ["adamw"]) == ""
    assert doubts.shared(runs) == [SUBSET]
    assert doubts.others(runs) == [("sgd, seed 1", "500 products were not enough")]


def training(subject: str, seed: int, **params: str) -> Measurement:
    numbers = {"final/val_accuracy": 0.9, "final/train_loss": 0.1}
    return Measurement("train", subject, seed, Done("", numbers, params, {}))


def test_a_project_of_which_a_part_is_trained_is_told_as_that_part():
    one = [training("sgd", 0, epochs="1")]
    assert compared(SETTING, one) == (
        "1 of the project's 3 optimizers: sgd (SGD lr=0.1). Not trained so far: adamw, theirs. "
        "Each trained mlp on 600 images of birds (image_folder) for 1 epoch, on 1 of the project's "
        "3 training seeds (seed 0)."
    )
    assert summary.nearest(extent(one), []) == "One optimizer is trained; a comparison needs two."
    assert extent([*one, training("adamw", 1)]).limit.endswith(
        "fewer than 6 seeds; they share none."
    )


def test_trainings_by_other_code_have_no_epochs_and_an_optimizer_its_own_seeds():
    runs = [training("sgd", seed, epochs="30") for seed in (0, 1, 2)] + [training("theirs", 0)]
    told = compared(SETTING, runs)
    assert "theirs (trained by other code)" in told
    assert "for 30 epochs or in other code, on 3 training seeds (seeds 0–2; theirs: seed 0)" in told


def test_a_number_of_fewer_seeds_than_were_trained_says_of_which():
    trained = [training("sgd", seed) for seed in (0, 1, 2)]
    measured = [*trained, lanczos("sgd", 1, 4.0)]
    ((*_, shown),) = leading(measured).cells
    assert shown == "4 ± 0.2; residual 0.05\n1 of 3 seeds (seed 1)"
    rows = {table.title: table.cells[0][1] for table in tables(measured)}
    assert rows == {"training": "3", "lanczos": "1 of 3"}


def test_of_pairs_an_optimizer_shows_its_worst():
    def path(pair: str, height: float, converged: float) -> Measurement:
        numbers = {"auto_neb/path_loss": height, "auto_neb/converged": converged}
        return Measurement("auto_neb", pair, 0, Done("", numbers, {}, {}))

    final = {"final/val_accuracy": 0.9, "final/train_loss": 0.1, "auto_neb/path_loss": 99.0}
    trained = [Measurement("train", name, 0, Done("", final, {}, {})) for name in "abc"]
    runs = [*trained, path("a – b", 0.5, 1.0), path("a – c", 0.7, 0.0), path("b – c", 0.2, 1.0)]
    rows = {name: text for name, *_, text in leading(runs).cells}
    assert rows == {"a": "0.7\nnot converged", "b": "0.5", "c": "0.7\nnot converged"}


def finding(metric: str, values: dict[str, list[float]], doubt: str = "") -> Finding:
    scale: Any = "difference" if "accuracy" in metric else "ratio"
    (pair,) = compare({k: dict(enumerate(v)) for k, v in values.items()}, scale=scale)
    return Finding(metric, pair, doubt=doubt)


def test_findings_are_told_from_the_larger_side_once_for_each_number():
    half = {"sgd": [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0], "adamw": [2.0] * 7}
    sharp = finding("lanczos/lambda_max", half, "not converged: sgd (seed 1)")
    (said,) = summary.established([], [sharp, finding("sgd_noise/lambda_h", half)], [])
    assert said.startswith("The largest curvature λ_max is 2 times as large for adamw as for sgd")
    assert said.endswith("seeds 0–6; not converged: sgd (seed 1)).")
    less = {"sgd": [0.8] * 7, "adamw": [0.9, 0.91, 0.92, 0.9, 0.91, 0.93, 0.9]}
    (said,) = summary.established([], [finding("final/val_accuracy", less)], [])
    assert "validation accuracy is larger by 0.11 for adamw than for sgd" in said


def at_equal_loss(found: Finding, method: str, values: dict[str, list[float]]) -> Finding:
    beside = compare({k: dict(enumerate(v)) for k, v in values.items()}, scale="ratio")
    return replace(found, matching=Matched(method, comparisons=tuple(beside)))


NEAR_TWO = {"sgd": [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0], "adamw": [2.0] * 7}
NEAR_FOUR = {"sgd": [0.5, 0.51, 0.49, 0.5, 0.5, 0.5, 0.5], "adamw": [2.0] * 7}  # surer
SAME = {"sgd": [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0], "adamw": [1.0] * 7}


def test_of_two_names_of_one_number_that_along_the_trajectories_is_told():
    sharp = at_equal_loss(finding("lanczos/lambda_max", NEAR_TWO), ALONG, NEAR_TWO)
    other = at_equal_loss(finding("sgd_noise/lambda_h", NEAR_FOUR), BY_ANCOVA, NEAR_FOUR)
    (said,) = summary.established([], [other, sharp], [])
    assert said.startswith("The largest curvature λ_max is 2 times as large for adamw as for sgd")
    assert "2 times at equal train loss, along the trajectories; seeds 0–6)." in said
    # What is established under one of the two names alone is told by that name and its method.
    open_one = at_equal_loss(sharp, ALONG, SAME)
    (said,) = summary.established([], [open_one, other], [])
    assert "λ_H is 4 times" in said and "at equal train loss, by ANCOVA;" in said
    known = Extent({"sgd": tuple(range(7)), "adamw": tuple(range(7))})
    assert "λ_H" not in summary.nearest(known, [sharp, replace(other, matching=open_one.matching)])


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (1, "fewer than 6 seeds; there is 1. From three seeds on"),
        (4, "seeds (2 more) establish it with a probability of "),
    ],
)
def test_what_is_not_established_says_how_many_seeds_would_settle_it(seeds, said):
    known = Extent({"a": tuple(range(seeds)), "b": tuple(range(seeds))})
    noisy = finding("lanczos/lambda_max", {"a": [2.0, 2.2, 1.9, 2.1][:seeds], "b": [1.0] * seeds})
    assert said in summary.nearest(known, [noisy])

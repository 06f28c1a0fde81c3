"""What stands on a report's first screen, and what stands beside its numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lsa.reports import doubts, summary
from lsa.reports.findings import Finding
from lsa.reports.measurements import Measurement
from lsa.reports.statistics.comparison import compare
from lsa.reports.tables import cell, leading
from lsa.tracking.runs import Done

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


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (1, "fewer than 6 seeds; there is 1. From three seeds on"),
        (4, "seeds (2 more) establish it with a probability of "),
    ],
)
def test_what_is_not_established_says_how_many_seeds_would_settle_it(seeds, said):
    setting: Any = SimpleNamespace(optimizers={"a": 0, "b": 0}, seeds=list(range(seeds)))
    noisy = finding("lanczos/lambda_max", {"a": [2.0, 2.2, 1.9, 2.1][:seeds], "b": [1.0] * seeds})
    assert said in summary.nearest(setting, [noisy])

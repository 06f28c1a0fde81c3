"""The tables of headline numbers, from measurements alone."""

from __future__ import annotations

import math

from lsa.reports.measurements import Measurement
from lsa.reports.tables import tables
from lsa.tracking.runs import Done


def one(step: str, subject: str, seed: int, numbers: dict[str, float]) -> Measurement:
    return Measurement(step, subject, seed, Done("id", numbers, {}, {}))


def training(name: str, seed: int, accuracy: float) -> Measurement:
    numbers = {"final/val_accuracy": accuracy, "final/train_loss": 0.1}
    return one("train", name, seed, numbers | {"final/val_accuracy_se_data": 0.01})


def spectrum(name: str, seed: int, value: float) -> Measurement:
    return one("lanczos", name, seed, {"lanczos/lambda_max": value})


def barrier(seed: int, value: float) -> Measurement:
    return one("interpolation", "sgd – adamw", seed, {"interpolation/barrier": value})


def test_training_comes_first_then_probes_then_pairs():
    found = tables([barrier(0, 1.0), spectrum("sgd", 0, 3.0), training("sgd", 0, 0.9)])
    assert [table.title for table in found] == ["training", "lanczos", "interpolation"]
    assert found[0].headings == ["optimizer", "seeds", "val accuracy", "train loss"]
    assert found[0].cells == [["sgd", "1", "0.9 ± 0.02", "0.1"]]  # its own error: one seed
    assert found[2].headings == ["optimizers", "seeds", "barrier"]  # no column without a number


def test_several_seeds_are_a_mean_with_its_interval_and_their_number():
    (found,) = tables([spectrum("sgd", 0, 1.0), spectrum("sgd", 1, 3.0), spectrum("adamw", 0, 2.0)])
    assert found.cells == [["sgd", "2", "2 ± 13"], ["adamw", "1", "2"]]  # t of one degree: 12.7


def test_a_number_that_one_seed_has_not_reached_has_a_median_and_no_mean():
    (found,) = tables([spectrum("sgd", s, v) for s, v in enumerate((1.0, 5.0, math.inf))])
    assert found.cells == [["sgd", "3", "median 5 (2 of 3 finite)"]]


def test_nothing_measured_is_no_table():
    assert tables([]) == []

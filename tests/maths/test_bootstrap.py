"""Errors of the bootstrap against closed forms."""

from __future__ import annotations

import pytest
import torch

from lsa.maths import bootstrap


def test_the_error_of_a_mean_is_its_standard_error():
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(1, 400, generator=rng, dtype=torch.float64)
    value, error = bootstrap.estimate(bootstrap.means({"a": table}, rng)["a"][:, 0])
    assert value == pytest.approx(table.mean().item())
    assert error == pytest.approx(table.std().item() / 20, rel=0.2)  # 4 deviations of 5 %


def test_what_two_points_have_in_common_cancels_in_their_difference():
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(50, generator=rng, dtype=torch.float64)
    means = bootstrap.means({"a": torch.stack([common, common + 1])}, rng)["a"]
    _, error = bootstrap.estimate(means[:, 1] - means[:, 0])
    assert error == pytest.approx(0, abs=1e-14)


def test_one_sample_has_no_error():
    means = bootstrap.means({"a": torch.ones(3, 1)}, torch.Generator())["a"]
    assert means.shape == (1, 3) and bootstrap.estimate(means[:, 0]) == (1.0, None)

"""Sketches are linear and tell lengths."""

from __future__ import annotations

import pytest
import torch

from lsa.maths import sketch
from lsa.maths.sketch import sketched


def test_a_short_vector_is_its_own_sketch():
    w = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sketched(w), w.double())


@pytest.mark.parametrize("kind", ["normal", "ones", "ramp", "periodic", "few", "neighbours"])
def test_the_length_of_a_long_vector_is_told_to_two_percent(kind):
    d = 20 * sketch.SIZE + 5
    rng = torch.Generator().manual_seed(0)
    place = torch.arange(d)
    w = {
        "normal": torch.randn(d, generator=rng),
        "ones": torch.ones(d),
        "ramp": place.float(),
        "periodic": (place % 512 == 0).float(),
        "few": torch.zeros(d).index_fill_(0, torch.randperm(d, generator=rng)[:50], 3.0),
        "neighbours": (place < 3 * sketch.SIZE).float(),
    }[kind]
    true = w.double().norm()
    assert abs(sketched(w).norm() - true) < 0.02 * true


def test_what_cancels_in_a_sum_cancels_in_its_sketch():
    """A part of 1e-6, which lengths of the summands do not show."""
    d, rng = 3 * sketch.SIZE, torch.Generator().manual_seed(0)
    a, b = (torch.randn(d, generator=rng) for _ in range(2))
    moved = a + 1e-6 * b
    true = (moved - a).double().norm()
    assert abs((sketched(moved) - sketched(a)).norm() - true) < 0.02 * true

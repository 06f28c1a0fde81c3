"""The overlap of subspaces in closed forms, and its mean over random ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from spectra import rotation

from lsa.maths.spectra.overlap import subspace_overlap
from lsa.runtime.errors import InputError


def test_subspace_overlap_is_the_mean_squared_cosine() -> None:
    Q = rotation(20)
    angle = 0.3
    tilted = math.cos(angle) * Q[:, :1] + math.sin(angle) * Q[:, 5:6]
    assert subspace_overlap(Q[:, :3], Q[:, :3] @ rotation(3, 1)) == pytest.approx(1)
    assert subspace_overlap(Q[:, :3], Q[:, 3:6]) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(Q[:, :1], tilted) == pytest.approx(math.cos(angle) ** 2)
    assert subspace_overlap(Q[:, :2], Q[:, :5].float()) == pytest.approx(1)


def test_random_subspaces_overlap_by_k_over_d() -> None:
    overlaps = [
        subspace_overlap(rotation(60, s)[:, :4], rotation(60, 99)[:, :4]) for s in range(30)
    ]
    # ‖UᵀV‖_F² / k: k² nearly independent squares of variance 2/d² each
    deviation = math.sqrt(4**2 * 2 / 60**2) / 4 / math.sqrt(30)
    assert np.mean(overlaps) == pytest.approx(4 / 60, abs=4 * deviation)


@pytest.mark.parametrize(
    ("U", "V"), [((5, 2), (6, 2)), ((5,), (5, 1)), ((5, 2), (5,))], ids=["d", "U", "V"]
)
def test_subspace_shapes(U: tuple[int, ...], V: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shapes"):
        subspace_overlap(
            torch.eye(6)[: U[0], : U[1] if len(U) > 1 else 1].reshape(U), torch.ones(V)
        )


def test_subspace_must_be_orthonormal() -> None:
    with pytest.raises(InputError, match="orthonormal"):
        subspace_overlap(torch.eye(4)[:, :2], torch.ones(4, 2))

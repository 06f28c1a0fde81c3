from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from potentials import F64, SmallClassifier
from torch import Tensor

from lsa.maths.paths.polyline import (
    arc_lengths,
    barriers,
    head_collapse_path,
    length_ratio,
    redistribute,
    refine,
    tangents,
)
from lsa.runtime.errors import InputError


def zigzag(n: int = 9, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=F64)


# --- arc length -----------------------------------------------------------------------------------


def test_length_of_a_half_circle() -> None:
    angle = torch.linspace(0, math.pi, 2001, dtype=F64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    # An inscribed polygon is short by a share h²/24 of the arc, h its angle per segment.
    short = (math.pi / 2000) ** 2 / 24
    assert length_ratio(circle) == pytest.approx(math.pi / 2 * (1 - short), rel=1e-10)
    assert arc_lengths(circle)[1000].item() == pytest.approx(math.pi / 2 * (1 - short), rel=1e-10)


def test_straight_path_has_ratio_one_and_coinciding_ends_none() -> None:
    line = torch.linspace(0, 1, 7, dtype=F64)[:, None] * torch.tensor([3.0, 4.0], dtype=F64)
    assert length_ratio(line) == pytest.approx(1, abs=1e-15)
    assert math.isnan(length_ratio(torch.zeros(3, 2)))


def along(path: Tensor, share: np.ndarray) -> np.ndarray:
    """Points at shares of the arc length, coordinate by coordinate with NumPy."""
    p = path.numpy()
    s = np.r_[0, np.linalg.norm(np.diff(p, axis=0), axis=1).cumsum()]
    return np.stack([np.interp(share * s[-1], s, column) for column in p.T], 1)


def test_refine_keeps_pivots_and_spaces_the_rest_evenly() -> None:
    path = zigzag(4)
    dense = refine(path, 3)
    assert torch.equal(dense[::4], path)
    torch.testing.assert_close(dense[6], (path[1] + path[2]) / 2)
    assert length_ratio(dense) == pytest.approx(length_ratio(path), rel=1e-14)


# --- redistribution -------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [None, [1.0, 1, 4, 1, 1, 2, 1, 1]])
def test_redistribution_puts_pivots_on_the_polyline_at_the_spacing(spacing: list | None) -> None:
    path = zigzag()
    c = np.ones(8) if spacing is None else np.array(spacing)
    share = np.r_[0, c.cumsum()] / c.sum()
    given = None if spacing is None else torch.tensor(spacing)
    np.testing.assert_allclose(redistribute(path, given), along(path, share), atol=1e-13)


def test_redistribution_of_a_straight_line_equalises_its_segments() -> None:
    s = torch.tensor([0.0, 0.02, 0.7, 0.71, 1.0], dtype=F64)
    line = s[:, None] * torch.tensor([1.0, -2, 2], dtype=F64)
    np.testing.assert_allclose(arc_lengths(redistribute(line)), 3 * np.linspace(0, 1, 5))


def test_redistribution_keeps_ends_bitwise_and_its_input() -> None:
    path = zigzag().float()
    path[0, 0], path[-1, 1] = -0.0, 1e-45
    before = path.clone()
    moved = redistribute(path)
    assert torch.equal(moved[[0, -1]].view(torch.int32), path[[0, -1]].view(torch.int32))
    assert torch.equal(path.view(torch.int32), before.view(torch.int32))
    assert moved.dtype == torch.float32


def test_redistribution_passes_over_coinciding_pivots() -> None:
    path = torch.tensor([[0.0], [0.0], [1.0], [1.0], [2.0]], dtype=F64)
    np.testing.assert_allclose(redistribute(path)[:, 0], [0, 0.5, 1, 1.5, 2])


@pytest.mark.parametrize("spacing", [torch.ones(3), torch.tensor([1.0] * 7 + [0.0])])
def test_redistribution_refuses_a_spacing_that_does_not_fit(spacing: Tensor) -> None:
    with pytest.raises(InputError, match="8 positive distances"):
        redistribute(zigzag(), spacing)
    with pytest.raises(InputError, match="at least 2"):
        redistribute(zigzag()[:1])


# --- tangents -------------------------------------------------------------------------------------

BEFORE, AFTER = (1.0, 0.0), (0.0, 2.0)  # τ⁻ and τ⁺ of the corner below


@pytest.mark.parametrize(
    ("energies", "backward", "forward"),
    [
        ((0, 1, 2), 0, 1),  # rising: the higher neighbour is ahead
        ((2, 1, 0), 1, 0),
        ((0, 2, 1), 1, 2),  # maximum, ΔV = 2 and 1; the larger goes to the higher neighbour
        ((1, 2, 0), 2, 1),
        ((1, 0, 2), 1, 2),  # minimum
        ((2, 0, 1), 2, 1),
        ((0, 1, 0), 1, 1),
        ((0, 1, 1), 0, 1),  # plateau after a rise
        ((1, 1, 0), 1, 0),
        ((1, 1, 1), 1, 1),  # flat
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_improved_tangent(energies: tuple, backward: int, forward: int, scale: float) -> None:
    corner = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=F64)
    tau = tangents(corner, scale * torch.tensor(energies, dtype=F64))
    expected = backward * np.array(BEFORE) + forward * np.array(AFTER)
    np.testing.assert_allclose(tau[0], expected / np.linalg.norm(expected), atol=1e-15)


def test_tangents_are_unit_and_turn_round_with_the_path() -> None:
    path = zigzag(12)
    energies = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=F64)
    tau = tangents(path, energies)
    torch.testing.assert_close(tau.norm(dim=1), torch.ones(10, dtype=F64))
    torch.testing.assert_close(tangents(path.flip(0), energies.flip(0)).flip(0), -tau)


def test_coinciding_pivots_have_no_tangent_and_no_nan() -> None:
    assert torch.equal(tangents(torch.ones(3, 4), torch.tensor([0.0, 1, 0])), torch.zeros(1, 4))


# --- barriers -------------------------------------------------------------------------------------


def test_barriers_in_closed_form() -> None:
    alpha = torch.linspace(0, 1, 1001, dtype=F64)
    found = barriers(1 + 2 * alpha + 8 * alpha * (1 - alpha), alpha)  # peak 4.125 at α = 5/8
    assert found.linear == pytest.approx(2, abs=1e-12)
    assert found.mean == pytest.approx(4.125 - 2, abs=1e-12)
    assert found.max == pytest.approx(4.125 - 3, abs=1e-12)


def test_barriers_leave_out_extrapolation() -> None:
    alpha = torch.linspace(-0.5, 1.5, 41)  # float32: 0 and 1 are hit to about 1e-7
    found = barriers(torch.where((alpha < -0.01) | (alpha > 1.01), 100.0, alpha), alpha)
    assert found.linear == pytest.approx(0, abs=1e-6)
    assert found.max == pytest.approx(0, abs=1e-6)
    assert found.mean == pytest.approx(0.5, abs=1e-6)


def test_convex_profile_has_no_barrier_and_its_mean_barrier_is_half_the_difference() -> None:
    alpha = torch.linspace(0, 1, 25, dtype=F64)
    found = barriers((alpha - 0.3) ** 2, alpha)
    assert (found.linear, found.max) == (0, 0)
    assert found.mean == pytest.approx((0.49 - 0.09) / 2)


def test_nan_stays_nan_and_divergence_is_infinite() -> None:
    alpha = torch.linspace(0, 1, 5)
    energies = torch.tensor([0.0, 1, float("nan"), 1, 0])
    assert all(math.isnan(v) for v in vars(barriers(energies, alpha)).values())
    energies[2] = torch.inf
    assert all(v == math.inf for v in vars(barriers(energies, alpha)).values())


def test_barriers_refuse_a_grid_without_endpoints() -> None:
    with pytest.raises(InputError, match="alpha=1"):
        barriers(torch.zeros(3), torch.tensor([0.0, 0.5, 0.9]))
    with pytest.raises(InputError, match="the length of alphas"):
        barriers(torch.zeros(3), torch.zeros(4))


# --- head collapse --------------------------------------------------------------------------------


def test_no_classifier_exceeds_ln_c_on_the_head_collapse_path() -> None:
    net = SmallClassifier()
    rng = torch.Generator().manual_seed(3)
    for scale in (0.3, 1.0, 3.0):  # endpoints below, near and far above ln C
        a, b = scale * torch.randn(2, len(net.head), generator=rng, dtype=F64)
        path = head_collapse_path(a, b, net.head, between=24)
        loss = net.dense(path)
        bound = max(loss[0].item(), loss[-1].item(), math.log(net.classes))
        assert loss.max().item() <= bound + 1e-12
        np.testing.assert_allclose(loss[25:51], math.log(net.classes), atol=1e-14)
        assert torch.equal(path[0], a) and torch.equal(path[-1], b)
        for leg in (loss[:26], loss[50:]):
            assert (leg[2:] - 2 * leg[1:-1] + leg[:-2] >= -1e-12).all()  # convex in the scale


def test_a_head_without_its_bias_breaks_the_bound() -> None:
    net = SmallClassifier()
    a, b = 3 * torch.randn(2, len(net.head), generator=torch.Generator().manual_seed(3), dtype=F64)
    weights_only = net.head.clone()
    weights_only[-net.classes :] = False
    middle = net.dense(head_collapse_path(a, b, weights_only)[1:3])
    assert (middle - math.log(net.classes)).abs().min() > 0.1


def test_head_collapse_needs_a_boolean_mask_that_selects() -> None:
    a = torch.ones(4)
    with pytest.raises(InputError, match="boolean mask"):
        head_collapse_path(a, a, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(InputError, match="boolean mask"):
        head_collapse_path(a, a, torch.ones(4))
    with pytest.raises(InputError, match="one length"):
        head_collapse_path(a, a, torch.ones(3, dtype=torch.bool))

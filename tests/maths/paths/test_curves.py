from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from potentials import F64, CurvedWell
from torch import Tensor

from lsa.maths.paths.autoneb import Cycle, auto_neb
from lsa.maths.paths.curves import TrainedCurve, train_curve
from lsa.maths.paths.polyline import refine
from lsa.runtime.errors import InputError


def train(seed: int = 0, **options) -> tuple[CurvedWell, TrainedCurve]:
    well = CurvedWell()
    options = {"steps": 400, "lr": 0.05, "samples": 8} | options
    rng = torch.Generator().manual_seed(seed)
    return well, train_curve(well, *well.ends(), rng=rng, **options)


def mean_loss(well: CurvedWell, curve: TrainedCurve) -> float:
    """∫ V(φ(t)) dt, exact for a polynomial of this degree."""
    t, w = np.polynomial.legendre.leggauss(12)
    return (torch.tensor(w / 2) * well.dense(curve.at(torch.tensor((t + 1) / 2)))).sum().item()


# --- curves ---------------------------------------------------------------------------------------


def bezier(a: Tensor, control: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return TrainedCurve(torch.stack([a, control, b]), torch.zeros(0), 0, "").at(t)


def test_bezier_in_closed_form() -> None:
    a, c, b = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = torch.linspace(0, 1, 7, dtype=F64)
    expected = torch.stack([(1 - s) ** 2 * a + 2 * s * (1 - s) * c + s**2 * b for s in t])
    torch.testing.assert_close(bezier(a, c, b, t), expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ends_are_bitwise(dtype: torch.dtype) -> None:
    a, c, b = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    a[0], b[0], c[1] = -0.0, 1e-45, torch.inf
    t = torch.tensor([0.0, 1.0])
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(bezier(a, c, b, t).view(bits), torch.stack([a, b]).view(bits))


# --- training -------------------------------------------------------------------------------------


def test_trained_bezier_is_the_optimum_of_the_curved_well() -> None:
    # The parabola y = 1 − x² is the Bezier curve with control point (0, 2): the optimum is the
    # minimum-energy path itself, and ∫(1 − x²)² dt = 8/15.
    well, curve = train()
    line = train(steps=0)[1]
    assert mean_loss(well, line) == pytest.approx(8 / 3, abs=1e-12)
    assert mean_loss(well, curve) == pytest.approx(8 / 15, abs=1e-4)
    target = 2 * well.Q[:, 1]
    assert (curve.points[1] - target).norm() < 0.05
    peak = well.dense(curve.at(torch.linspace(0, 1, 201, dtype=F64))).max().item()
    assert peak == pytest.approx(1, abs=1e-3)
    assert curve.losses[-50:].mean() < curve.losses[:5].mean() / 2


def test_one_sample_per_step_as_published() -> None:
    well, curve = train(samples=1, steps=1000, lr=0.02)
    assert mean_loss(well, curve) == pytest.approx(8 / 15, abs=2e-3)
    assert curve.grad_evals == len(well.calls) == 1000


def test_gradient_is_that_of_the_mean_loss() -> None:
    well = CurvedWell()
    a, b = well.ends()
    rng = torch.Generator().manual_seed(0)
    curve = train_curve(well, a, b, steps=1, lr=1.0, momentum=0, samples=4096, rng=rng)
    step = (a + b) / 2 - curve.points[1]
    # By midpoint rule in 4096 strata, error O(1/4096); d/dc ∫V = ∫ 2t(1−t) ∇V dt = −16/15·a·e_y.
    t, w = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(12))
    t, w = (t + 1) / 2, w / 2
    exact = (w * 2 * t * (1 - t)) @ well(bezier(a, (a + b) / 2, b, t))[1]
    torch.testing.assert_close(step, exact, atol=1e-3, rtol=0)


def test_curve_is_a_start_for_a_band() -> None:
    well, curve = train()
    a, b = well.ends()
    start = curve.at(torch.linspace(0, 1, 8, dtype=F64))
    options = {"schedule": [Cycle(100, 0.02)], "start": start, "momentum": 0.5, "tol": 1e-6}
    found = auto_neb(well, well.dense, a, b, **options)
    assert found.converged
    assert found.max_energy == pytest.approx(1, abs=1e-9)
    assert found.energies.max() <= well.dense(refine(start, 9)).max()


# --- invariants -----------------------------------------------------------------------------------


def test_endpoints_inputs_and_randomness() -> None:
    well = CurvedWell()
    a, b = (end.requires_grad_() for end in well.ends())
    state = torch.get_rng_state()
    first, second, other = (
        train_curve(well, a, b, steps=20, lr=0.05, rng=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.points, second.points)
    assert not torch.equal(first.points, other.points)
    assert torch.equal(first.points[[0, -1]], torch.stack([a, b]).detach())
    assert torch.equal(a, well.ends()[0]) and not first.points.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_are_numbered_and_gradients_counted() -> None:
    well, curve = train(steps=7, samples=3)
    assert well.calls == [(step, 3) for step in range(7)]
    assert (curve.grad_evals, len(curve.losses)) == (21, 7)
    assert curve.stop_reason == "budget of 7 steps spent"


def test_rate_falls_as_published() -> None:
    slope = torch.ones(1, dtype=F64)

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return p[:, 0], slope.expand_as(p)  # the control point moves by lr·w(t)

    ends = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    moved = []
    for steps in (50, 90, 100, 101):  # the same draws; the rate depends on the share of steps
        curve = train_curve(
            energy, *ends, steps=steps, lr=1.0, momentum=0, rng=torch.Generator().manual_seed(0)
        )
        moved.append(0.5 - curve.points[1].item())
    t = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=F64)
    for steps, found in zip((50, 90, 100, 101), moved, strict=True):
        share = torch.arange(steps, dtype=F64) / steps
        rate = np.interp(share, [0, 0.5, 0.9, 1], [1, 1, 0.01, 0.01])
        weight = 2 * t[:steps] * (1 - t[:steps])
        assert found == pytest.approx((torch.tensor(rate) * weight).sum().item(), rel=1e-12)


def test_a_non_finite_energy_keeps_the_last_finite_curve() -> None:
    well = CurvedWell()

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        energies, gradients = well(p)
        return energies * (math.nan if step == 5 else 1), gradients

    rng = torch.Generator().manual_seed(0)
    curve = train_curve(energy, *well.ends(), steps=10, lr=0.05, rng=rng)
    assert curve.stop_reason == "energy is nan after 5 steps; lower lr=0.05"
    assert curve.points.isfinite().all()
    assert torch.equal(curve.points, train_five(well))


def train_five(well: CurvedWell) -> Tensor:
    """Five steps at the rate of a training of ten, which is constant that long."""
    rng = torch.Generator().manual_seed(0)
    points = torch.stack(well.ends())
    a, b = points
    c, v = (a + b) / 2, torch.zeros_like(a)
    for _ in range(5):
        t = torch.rand(1, generator=rng, dtype=F64)
        v = 0.9 * v + (2 * t * (1 - t)) * well(bezier(a, c, b, t))[1][0]
        c = c - 0.05 * v
    return torch.stack([a, c, b])


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"lr": 0.0}, "lr > 0"),
        ({"samples": 0}, "samples=0"),
    ):
        with pytest.raises(InputError, match=message):
            train(**options)

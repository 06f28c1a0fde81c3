"""Chunks, memory and layout: what the engine may choose changes no derivative."""

from __future__ import annotations

import pytest
import torch
from tiny import normal, rng, seeded
from torch import nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives import budget
from lsa.runtime.errors import InputError
from lsa.training import models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def test_chunks_of_uneven_size_are_weighted_exactly():
    """A split of 200 + 56 whose products an unweighted average gets wrong by more than half."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    x = torch.cat([normal(200, 5), 5 + 3 * normal(56, 5, seed=3)])
    y = torch.randint(0, 3, (256,), generator=rng())
    theta, v = flatten(model), normal(66)
    whole, uneven = Landscape(model, x, y, chunk=256), Landscape(model, x, y, chunk=200)
    assert uneven.loss(theta) == pytest.approx(whole.loss(theta), rel=1e-12)
    parts = [whole.subset(indices) for indices in torch.arange(256).split(200)]
    for name in ("hessian", "gauss_newton", "covariance"):
        a, b = getattr(whole, name)(theta)(v), getattr(uneven, name)(theta)(v)
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13), name
        unweighted = sum(getattr(part, name)(theta)(v) for part in parts) / 2
        assert (unweighted - a).norm() > 0.5 * a.norm(), name  # the mistake would show


def test_one_chunk_and_uneven_chunks_agree(mlp):
    uneven, theta = mlp
    whole = Landscape(uneven.model, uneven.x, uneven.y, chunk=23)
    v = normal(66)
    assert uneven.loss(theta) == pytest.approx(whole.loss(theta), rel=1e-12)
    assert torch.allclose(uneven.gradient(theta), whole.gradient(theta), rtol=1e-12, atol=1e-14)
    assert torch.allclose(uneven.curvatures(theta, v), whole.curvatures(theta, v), rtol=1e-12)
    for name in ("hessian", "gauss_newton", "covariance"):
        a, b = getattr(whole, name)(theta)(v), getattr(uneven, name)(theta)(v)
        assert (a - b).norm() <= 1e-12 * a.norm(), name


def test_a_setting_fixes_chunk_and_memory_for_all_but_who_says_otherwise(mlp, monkeypatch):
    landscape, theta = mlp
    model, x, y, v = landscape.model, landscape.x, landscape.y, normal(len(theta))
    expected = landscape.hessian(theta)(v)
    for chunk, memory in ((5, 0), (5, 10**9), (23, 0)):
        monkeypatch.setattr(budget, "_configured", budget.Settings(chunk, memory))
        fixed = Landscape(model, x, y)
        for one in (fixed, fixed.subset(torch.arange(9))):
            assert (one.chunk, one.graph_memory) == (chunk, memory)
        assert torch.allclose(fixed.hessian(theta)(v), expected, rtol=1e-12)
    own = Landscape(model, x, y, chunk=7, memory=8)
    assert (own.chunk, own.graph_memory) == (7, 8)


@pytest.mark.parametrize("chunk", [3, 24])
@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_choice_of_the_engine_gives_the_same_derivatives(chunk, memory, layout, monkeypatch):
    """In float32; the reference has the usual choices, in float64."""
    model = models.build("simple_cnn", input_shape=(3, 8, 8), classes=10, seed=0, width=8)
    x, y = normal(24, 3, 8, 8).float(), torch.arange(24) % 10
    usual = Landscape(model, x, y)
    monkeypatch.setattr(budget, "_configured", budget.Settings(layout=layout))
    forced = Landscape(model, x, y, chunk=chunk, memory=memory)
    assert forced.layout == layout
    for one in (forced, forced.subset(torch.arange(12)), forced.with_model(model)):
        assert (one.chunk, one.graph_memory) == (chunk, memory)
        assert one.x.is_contiguous(memory_format=budget.LAYOUTS[layout])
    theta = flatten(model)
    exact, v = usual.double(), normal(len(theta))
    assert relative(forced.gradient(theta), exact.gradient(theta.double())) < 1e-5
    for name in ("hessian", "gauss_newton", "covariance"):
        found = getattr(forced, name)(theta)(v.float())
        assert relative(found, getattr(exact, name)(theta.double())(v.double())) < 1e-5
    u = v.float() / v.float().norm()
    assert (
        relative(forced.curvatures(theta, u), exact.curvatures(theta.double(), u.double())) < 1e-5
    )


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_a_layout_that_there_is_not_is_refused(mlp, monkeypatch):
    landscape, _ = mlp
    with pytest.raises(InputError, match="layout='rows'; choose channels_last or contiguous"):
        Landscape(landscape.model, landscape.x, landscape.y, layout="rows")
    monkeypatch.setenv("LSA_LAYOUT", "rows")
    with pytest.raises(InputError, match="LSA_LAYOUT='rows' is none of channels_last, contiguous;"):
        budget.from_environment()

"""Sums and per-sample values of two ranks against those of one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from two_ranks import on_two_ranks

from lsa.landscape import Landscape, flatten
from lsa.landscape.sharded import Shares, shared
from lsa.runtime import ranks

SIZES = {"uneven": 7, "even": 8, "fewer than ranks": 1}


class Once(torch.autograd.Function):
    """Cubes, of which torch knows the first derivative alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradients[0]


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # pyright: ignore[reportReturnType]


def landscape(
    n: int, *, norm: bool = False, cubes: bool = False, loss: Any = F.cross_entropy
) -> tuple[Landscape, Tensor, Tensor]:
    """A landscape of n samples in chunks of 3, a θ and a vector."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(5))
    if cubes:
        layers.insert(1, Cubes())
    model = nn.Sequential(*layers).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    theta = flatten(model)
    v = torch.randn(len(theta), generator=generator, dtype=torch.float64)
    return shared(Landscape(model, x, y, loss, chunk=3)), theta, v


def quantities(n: int, **kind: Any) -> dict[str, Tensor]:
    """All that a landscape of n samples can compute."""
    place, theta, v = landscape(n, **kind)
    losses, wrong = place.per_sample(theta)
    assert wrong is not None and wrong.dtype == torch.bool
    part = place.restricted(theta, ["0.weight"])
    return {
        "loss": torch.tensor(place.loss(theta)),
        "losses": losses,
        "wrong": wrong,
        "gradient": place.gradient(theta),
        "sample_gradients": torch.cat(list(place.sample_gradients(theta))),
        "slopes": place.slopes(theta, v),
        "curvatures": place.curvatures(theta, v),
        "gauss_newton_curvatures": place.gauss_newton_curvatures(theta, v),
        "hessian": place.hessian(theta)(v),
        "hessian of a block": place.hessian(theta)(torch.stack([v, theta], 1)),
        "gauss_newton": place.gauss_newton(theta)(v),
        "covariance": place.covariance(theta)(v),
        "second moment": place.covariance(theta, centred=False)(v),
        "block of the hessian": part.hessian(flatten(part.model))(v[:20]),
        "other model": place.with_model(place.model).gradient(theta),
    }


def on_batch() -> Tensor:
    """The gradient with batch norm on the statistics of all samples."""
    place, theta, _ = landscape(6, norm=True)
    return place.on_batch_statistics().gradient(theta)


def weighted() -> dict[str, Tensor]:
    """With classes that weigh differently, so that no part has the weight of its samples."""
    weights = torch.tensor([1, 2, 4], dtype=torch.float64)
    return quantities(7, loss=nn.CrossEntropyLoss(weight=weights))


def by_differences() -> dict[str, Tensor]:
    """Products and curvatures of a network without second derivatives."""
    place, theta, v = landscape(7, cubes=True)
    return {"hessian": place.hessian(theta)(v), "curvatures": place.curvatures(theta, v)}


CASES = {
    **{name: partial(quantities, n) for name, n in SIZES.items()},
    "weighted": weighted,
    "by differences": by_differences,
}


def everything() -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    return {name: measure() for name, measure in CASES.items()}, on_batch()


@pytest.fixture(scope="module")
def together():
    return on_two_ranks(everything)


@pytest.mark.parametrize("name", CASES)
def test_a_shared_landscape_is_the_whole_one(name, together):
    alone = CASES[name]()
    (first, _), (second, _) = together
    for key, value in alone.items():
        near = 1e-6 if name == "by differences" else 1e-12
        torch.testing.assert_close(first[name][key], value, rtol=near, atol=near)
        assert torch.equal(first[name][key], second[name][key]), "ranks must have the same bits"


def test_batch_statistics_are_of_all_samples(together):
    for _, gradient in together:
        torch.testing.assert_close(gradient, on_batch(), rtol=1e-12, atol=1e-14)


def evaluated() -> list[int]:
    """Sizes of the chunks that a rank evaluates for one loss."""
    place, theta, _ = landscape(7)
    seen: list[int] = []
    place.model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    place.loss(theta)
    return seen


def test_each_rank_works_on_its_own_samples():
    assert on_two_ranks(evaluated) == [[3], [3, 1]]


def with_passes_of_its_own() -> Tensor:
    place, theta, _ = landscape(7)
    # As GPUs of unequal free memory choose.
    place.data = place.samples.in_chunks(1 + 2 * ranks.rank())
    return torch.cat(list(place.sample_gradients(theta)))


def test_ranks_whose_passes_differ_go_through_samples_together():
    place, theta, _ = landscape(7)
    alone = torch.cat(list(place.sample_gradients(theta)))
    for found in on_two_ranks(with_passes_of_its_own):
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-14)


def alone_again() -> str:
    place, theta, _ = landscape(7)
    if ranks.rank() == 1:
        return "gone"
    try:
        place.loss(theta)
    except ranks.InputError as error:
        return str(error)
    return "nothing noticed"


def test_a_rank_that_is_gone_is_told_in_one_line():
    first, _ = on_two_ranks(alone_again)
    assert "rank 0 of 2 has lost another" in first and "\n" not in first


def test_without_torchrun_nothing_is_shared():
    place, *_ = landscape(7)
    assert not isinstance(place.data, Shares) and ranks.size() == 1 and ranks.agreed("a") == "a"

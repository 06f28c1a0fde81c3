"""Gauss–Newton parts of networks that return a tensor and what they make from it."""

from __future__ import annotations

import pytest
import torch
from dense import matrix
from tiny import N, rng, seeded
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import lsa

X = torch.randn(N, 4, generator=rng()).double()


class Coder(nn.Module):
    """Gives what it decodes, and the code that it is decoded from; `noisy`: the code varies."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.into, self.out, self.noisy = nn.Linear(4, 2), nn.Linear(2, 4), noisy

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.tanh(self.into(x))
        return self.out(code + torch.randn_like(code) if self.noisy else code), code


def loss(outputs: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    decoded, code = outputs
    return ((decoded - x).square().sum(1) + code.square().sum(1)).mean()


def each(outputs: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return torch.stack(
        [loss((o[None], c[None]), t[None]) for o, c, t in zip(*outputs, x, strict=True)]
    )


def truth(model: nn.Module, seeds: list[int]) -> Tensor:
    """Jᵀ∇²L J by the numbers of both outputs, `(d, d)`, a mean over the seeds."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def of(seed: int) -> Tensor:
        def outputs(t: Tensor) -> Tensor:
            torch.manual_seed(seed)
            parts = t.split([shape.numel() for shape in shapes])
            views = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            return torch.cat([o.flatten() for o in functional_call(model, views, (X,))])

        def of_outputs(o: Tensor) -> Tensor:
            return loss((o[: 4 * N].view(N, 4), o[4 * N :].view(N, 2)), X)

        J: Tensor = jacobian(outputs, theta)  # pyright: ignore[reportAssignmentType]
        curved: Tensor = hessian(of_outputs, outputs(theta))  # pyright: ignore[reportAssignmentType]
        return J.T @ curved @ J

    return torch.stack([of(seed) for seed in seeds]).mean(0)


CASES = {
    "tensors": lambda model: lsa.Landscape(model, X, X, loss),
    "batches": lambda model: lsa.Landscape(model, [(X, X)], loss=loss),
    "weights": lambda model: lsa.Landscape(
        model,
        [(X, X)],
        objective=lsa.objectives.weighted(each, lambda batch: torch.ones(len(batch[0]))),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_an_output_that_is_made_from_another_counts_once(kind):
    model = seeded(lambda: Coder(noisy=False)).double()
    landscape = CASES[kind](model)
    theta = landscape.theta
    G = truth(model, [0])
    torch.testing.assert_close(matrix(landscape.gauss_newton(theta), theta), G)
    u = torch.ones_like(theta)
    mean = landscape.gauss_newton_curvatures(theta, u).mean()
    torch.testing.assert_close(mean, u @ G @ u)


def test_an_autoencoder_with_draws_has_a_gauss_newton_part():
    model = seeded(lambda: Coder(noisy=True)).double()
    landscape = lsa.Landscape(model, [(X, X)], loss=loss, draws=2)
    G = truth(model, [0, 1])
    torch.testing.assert_close(matrix(landscape.gauss_newton(landscape.theta), landscape.theta), G)

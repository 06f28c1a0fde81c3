"""Dense derivatives of a loss that a test writes down itself, as oracles for a landscape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsa.landscape import Landscape, flatten

Loss = Callable[..., Tensor]  # model called as a function → L, or ℓᵢ `(N,)`


def matrix(matvec: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """`(d, d)`, from its product with each unit vector."""
    return torch.stack([matvec(e) for e in torch.eye(len(theta), dtype=theta.dtype)], dim=1)


def of_theta(model: nn.Module, loss: Loss) -> Callable[[Tensor], Tensor]:
    """A loss `(model) → L` as a function of θ."""
    named = dict(model.named_parameters())

    def of(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        views = {n: t.view_as(p) for (n, p), t in zip(named.items(), parts, strict=True)}
        return loss(lambda *args: functional_call(model, views, args))

    return of


def largest(model: nn.Module, loss: Loss) -> float:
    """λ_max of a loss `(model) → L` at a network's parameters, by double backward."""
    H = torch.autograd.functional.hessian(of_theta(model, loss), flatten(model))
    return torch.linalg.eigvalsh(H.double())[-1].item()


def sample_hessians(landscape: Landscape, theta: Tensor) -> Tensor:
    """`(N, d, d)`, of each sample alone."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda t, x=x, y=y: landscape.loss_function(landscape.outputs(t, x[None]), y[None]),
                theta,
            )
            for x, y in zip(landscape.x, landscape.y, strict=True)
        ]
    )


class bound:
    """The network at θ, as a function of its inputs, with attention by its formula."""

    def __init__(self, landscape: Landscape, theta: Tensor) -> None:
        parts = theta.split(landscape.network.sizes)
        shapes = [p.shape for p in landscape.unflatten(theta).values()]
        named = zip(landscape.network.names, parts, shapes, strict=True)
        self._named = {n: p.view(s) for n, p, s in named}
        self._model = landscape.model

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self._named.items())

    def parameters(self) -> list[Tensor]:
        return list(self._named.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(self._model, self._named, args, kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def agree(
    landscape: Landscape,
    theta: Tensor,
    loss: Loss,
    losses: Loss | None = None,
    *,
    dense: bool = True,
    rounding: float = 1e-9,
) -> None:
    """Compare everything that a landscape gives with dense derivatives by double backward.

    Args:
        landscape: In float64.
        theta: Where.
        loss: `(model) → L`, of all data at once.
        losses: `(model) → (N,)`, per sample, with mean L; none where samples interact.
        rounding: Of what the network computes, relative; 1e-9 in float64.
        dense: Make the whole Hessian; else one product of it, by double backward as well.
    """

    def whole(t: Tensor) -> Tensor:
        return loss(bound(landscape, t))

    # A network that computes in float32 inside may give its loss in it.
    close = {"rtol": rounding, "atol": rounding / 100, "check_dtype": rounding < 1e-6}
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(len(theta), generator=rng, dtype=theta.dtype)
    if dense:
        Hv = torch.autograd.functional.hessian(whole, theta) @ v
    else:
        Hv = torch.autograd.functional.hvp(whole, theta, v)[1]
    (g,) = torch.autograd.grad(whole(t := theta.clone().requires_grad_()), t)
    torch.testing.assert_close(landscape.loss(theta), whole(t).item(), **close)
    torch.testing.assert_close(landscape.gradient(theta), g, **close)
    torch.testing.assert_close(landscape.hessian(theta)(v), Hv, **close)
    if losses is None:
        return

    def each(t: Tensor) -> Tensor:
        return losses(bound(landscape, t))

    J = torch.autograd.functional.jacobian(each, theta)
    torch.testing.assert_close(landscape.losses(theta), each(theta), **close)
    torch.testing.assert_close(torch.cat([*landscape.sample_gradients(theta)]), J, **close)
    torch.testing.assert_close(landscape.slopes(theta, v), J @ v, **close)
    C = torch.cov(J.T, correction=0)
    torch.testing.assert_close(landscape.covariance(theta)(v), C @ v, **close)

    alpha = theta.new_zeros(()).requires_grad_()
    slopes = [grad(value, alpha, create_graph=True)[0] for value in each(theta + alpha * v)]
    bend = torch.stack(
        [grad(s, alpha, retain_graph=True, materialize_grads=True)[0] for s in slopes]
    )
    torch.testing.assert_close(landscape.curvatures(theta, v), bend, **close)

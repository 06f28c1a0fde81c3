"""The head of a network: the last linear layer, which gives the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lsa.landscape.batched import Batched
from lsa.landscape.landscape import Landscape


def find_head(landscape: Landscape, *thetas: Tensor) -> Tensor | None:
    """True at the coordinates of θ that belong to the last linear layer, shape `(d,)`.

    None unless scaling them scales the logits at every θ given, and the loss without them is ln C:
    what `polyline.head_collapse_path` needs to be a bound. Found by trying, on 64 samples.
    """
    if isinstance(landscape.data, Batched):  # whose outputs and targets only the objective knows
        return None
    few = landscape.subset(torch.arange(min(landscape.n_samples, 64), device=thetas[0].device))
    outputs = few.outputs(thetas[0], few.x).detach()
    if outputs.ndim != 2 or few.y.ndim != 1 or few.y.is_floating_point():
        return None
    without = few.loss_function(torch.zeros_like(outputs), few.y).item()
    if not math.isclose(without, math.log(outputs.shape[1]), abs_tol=1e-5):
        return None
    layers = [n for n, m in landscape.model.named_modules() if isinstance(m, nn.Linear)]
    for name in reversed(layers):
        head = _mask(landscape, thetas[0], f"{name}." if name else "")
        if head.any() and all(_is_linear_in(few, theta, head) for theta in thetas):
            return head
    return None


def _mask(landscape: Landscape, theta: Tensor, prefix: str) -> Tensor:
    """True at the coordinates of the parameters whose names begin so."""
    named = landscape.unflatten(theta).items()
    return torch.cat(
        [torch.full((p.numel(),), n.startswith(prefix), device=theta.device) for n, p in named]
    )


@torch.no_grad()
def _is_linear_in(few: Landscape, theta: Tensor, head: Tensor) -> bool:
    """Whether scaling the head scales the logits: by ½, and to exactly zero."""
    full, half, none = (
        few.outputs(torch.where(head, scale * theta, theta), few.x) for scale in (1, 0.5, 0)
    )
    slack = 1e-5 * full.abs().max().item()
    return torch.allclose(half, full / 2, rtol=0, atol=slack) and not none.any()

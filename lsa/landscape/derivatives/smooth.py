"""GELU and SiLU, whose gradient torch differentiates as many elementwise operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.again import again

aten = torch.ops.aten

AT_ONCE, AT_ONCE_ON_CARD = 1 << 15, 1 << 24  # numbers


def gelu(x: Tensor) -> Tensor:
    """GELU x Φ(x) of a tensor of any shape (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return _Smooth.apply(x, "gelu")


def silu(x: Tensor) -> Tensor:
    """SiLU x σ(x) of a tensor of any shape (Elfwing et al. 2017, arXiv 1702.03118)."""
    return _Smooth.apply(x, "silu")


def _slope(g: Tensor, x: Tensor, kind: str) -> Tensor:
    """g f'(x)."""
    return aten.gelu_backward(g, x) if kind == "gelu" else aten.silu_backward(g, x)


def _bend(x: Tensor, kind: str) -> Tensor:
    """f''(x): (2 − x²) φ(x) of GELU, σ(1 − σ)(2 + x (1 − 2σ)) of SiLU."""
    if kind == "gelu":
        square = x.square()
        density = square.mul(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        return square.neg_().add_(2).mul_(density)
    s = x.sigmoid()
    return (1 - 2 * s).mul_(x).add_(2).mul_(s).mul_(1 - s)


def _bent(x: Tensor, u: Tensor, g: Tensor, kind: str) -> Tensor:
    """f''(x) u g, some numbers at a time: what lies between stays in a cache."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = (
        t.reshape(-1).split(AT_ONCE_ON_CARD if x.is_cuda else AT_ONCE) for t in (x, u, g, result)
    )
    for x_, u_, g_, out in zip(*rows, strict=True):
        torch.mul(_bend(x_, kind).mul_(u_), g_, out=out)
    return result


class _Smooth(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return aten.gelu(x) if kind == "gelu" else aten.silu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return _Gradient.apply(*gradients, *ctx.saved_tensors, ctx.kind), None


class _Gradient(Function):
    """g f'(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.kind = kind
        return _slope(g, x, kind)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (u,) = gradients
        g, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = aten.gelu if ctx.kind == "gelu" else aten.silu
            return *again(plain, (x,), g, (u,)), None
        return _slope(u, x, ctx.kind), _bent(x, u, g, ctx.kind), None

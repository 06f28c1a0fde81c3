"""Layer norm and root-mean-square norm whose second derivative is a closed form.

The formulas are those of `group_norm`, with the last dimension for the group; without the means μ
and m(t) they are those of the root-mean-square norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.again import again


def row_norm(x: Tensor, w: Tensor, b: Tensor | None, eps: float, *, centred: bool) -> Tensor:
    """w x̂ + b, each row of x̂ with mean square 1: layer norm (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: Rows `(…, D)`.
        w: Scale `(D,)`.
        b: Shift `(D,)`, or none.
        eps: Added to the mean square.
        centred: Whether the mean is taken from each row; else it is the root-mean-square norm
            (Zhang & Sennrich 2019, arXiv 1910.07467).
    """
    return _RowNorm.apply(x, w, b, eps, centred)


class _RowNorm(Function):
    """y = w x̂ + b, x̂ = (x − μ) r."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        if centred:
            y, mean, r = torch.ops.aten.native_layer_norm(x, w.shape, w, b, eps)
        else:
            mean, r = None, (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            y = x * r * w
            y = y if b is None else y.add_(b)
        ctx.save_for_backward(x, w, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        gx, gw, gb = _Gradient.apply(*gradients, *ctx.saved_tensors, ctx.eps)
        return gx, gw, gb if ctx.needs_input_grad[2] else None, None, None


class _Gradient(Function):
    """gx = P(w g), gw = ∑ g x̂, gb = ∑ g, P(t) = r (t − m(t) − x̂ m(t x̂)), m a row's mean."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor | None, r: Tensor, eps: float
    ) -> tuple:
        ctx.eps = eps
        ctx.save_for_backward(g, x, w, mean, r)
        ctx.set_materialize_grads(False)
        if mean is not None:
            every = [True, True, True]
            backward = torch.ops.aten.native_layer_norm_backward
            return backward(g, x, w.shape, mean, r, w, w, every)
        normed = x * r
        return (
            _projected(g * w, normed, r, False),
            (g * normed).flatten(0, -2).sum(0),
            g.flatten(0, -2).sum(0),
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents u, z, c of gx, gw, gb, with t = w g and q = m(t P(u)):

        w P(u) + z x̂ + c for g, P(z g − r m(t x̂) u − r m(u x̂) t) − r x̂ q for x, ∑ g P(u) for w.
        """
        g, x, w, mean, r = ctx.saved_tensors
        u, z, c = gradients
        centred = mean is not None
        if torch.is_grad_enabled():
            b = torch.zeros_like(w).requires_grad_()
            plain = partial(_plain, eps=ctx.eps, centred=centred)
            derivatives = again(plain, (x, w, b), g, (u, z, c))
            return *derivatives[:3], None, None, None
        normed = (x - mean).mul_(r) if centred else x * r
        t = g * w
        dg = torch.zeros_like(g) if c is None else c.expand_as(g)
        dx = dw = None
        inner = None
        if u is not None:
            P = _projected(u, normed, r, centred)
            dg = torch.addcmul(dg, P, w)
            dw = (g * P).flatten(0, -2).sum(0)
            turn = (t * P).mean(-1, keepdim=True).mul_(r)
            of_t, of_u = ((a * normed).mean(-1, keepdim=True).mul_(r) for a in (t, u))
            inner = (u * of_t).addcmul_(t, of_u).neg_()
            dx = -turn * normed
        if z is not None:
            dg = torch.addcmul(dg, normed, z)
            inner = g * z if inner is None else inner.addcmul_(g, z)
        if inner is not None:
            P = _projected(inner, normed, r, centred)
            dx = P if dx is None else dx.add_(P)
        return dg, dx, dw, None, None, None


def _plain(x: Tensor, w: Tensor, b: Tensor, eps: float, centred: bool) -> Tensor:
    if centred:  # torch's own third derivative of layer norm is wrong, seen in 2.14
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w + b


def _projected(t: Tensor, normed: Tensor, r: Tensor, centred: bool) -> Tensor:
    """P(t)."""
    projection = torch.addcmul(t, normed, (t * normed).mean(-1, keepdim=True), value=-1)
    if centred:
        projection.sub_(t.mean(-1, keepdim=True))
    return projection.mul_(r)

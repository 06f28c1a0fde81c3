"""Cross entropy over many classes whose second derivative makes no more tables than needed.

Logits of all tokens are the largest tensors of a language model. torch differentiates the gradient
by several tables of their size; here one is made, row by row. `of_hidden` makes none: it takes what
the head reads and computes the logits of some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.again import again

ROWS, ROWS_ON_CARD = 1 << 22, 1 << 25  # logits that are computed at once


def cross_entropy(z: Tensor, y: Tensor, ignored: int) -> Tensor:
    """Cross entropy −log softmax(z)_y, `(n,)`.

    Args:
        z: Logits `(n, C)`.
        y: Labels `(n,)`, of `torch.int64`.
        ignored: Label whose loss is 0.
    """
    return _CrossEntropy.apply(z, y, ignored)


def of_hidden(h: Tensor, w: Tensor, y: Tensor, ignored: int = -100) -> Tensor:
    """Cross entropy `(n,)` of the logits h Wᵀ, which are made some rows at a time.

    Args:
        h: What the head reads, `(n, width)`.
        w: W `(C, width)`.
        y: Labels `(n,)`, of `torch.int64`.
        ignored: Label whose loss is 0; the default is torch's.
    """
    return _OfHidden.apply(h, w, y, ignored)


def _chunks(n: int, classes: int, like: Tensor) -> Iterator[slice]:
    size = max(1, (ROWS_ON_CARD if like.is_cuda else ROWS) // classes)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _losses(z: Tensor, y: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Losses `(n,)`, and the logarithms of the rows' sums `(n, 1)`."""
    sums = z.logsumexp(1, keepdim=True)
    kept = y != ignored
    picked = z.gather(1, torch.where(kept, y, 0)[:, None])
    return torch.where(kept, (sums - picked)[:, 0], 0), sums


def _minus_one(t: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """t with g taken from each row's label."""
    return t.scatter_add_(1, y[:, None], -g)


def _weighed(g: Tensor, y: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """g `(n, 1)` without those ignored, and labels that can be looked up."""
    kept = y != ignored
    return torch.where(kept, g, 0)[:, None], torch.where(kept, y, 0)


def _second(P: Tensor, u: Tensor, g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """From the cotangent u of g (P − 1_y): that of g `(n,)`, and g P (u − ∑ P u) for the logits.

    u is overwritten.
    """
    mean = (P * u).sum(1, keepdim=True)
    to_g = (mean - u.gather(1, y[:, None]))[:, 0]
    return to_g, u.sub_(mean).mul_(P).mul_(g)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, ignored: int) -> Tensor:
        losses, sums = _losses(z, y, ignored)
        ctx.save_for_backward(z, y, sums)
        ctx.ignored = ignored
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return _Gradient.apply(*gradients, *ctx.saved_tensors, ctx.ignored), None, None


class _Gradient(Function):
    """g (P − 1_y)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, z: Tensor, y: Tensor, sums: Tensor, ignored: int) -> Tensor:
        ctx.save_for_backward(g, z, y, sums)
        ctx.ignored = ignored
        g, y = _weighed(g, y, ignored)
        return _minus_one((z - sums).exp_().mul_(g), g, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (u,) = gradients
        given, z, labels, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            derivatives = again(lambda z: _losses(z, labels, ctx.ignored)[0], (z,), given, (u,))
            return *derivatives, None, None, None
        g, y = _weighed(given, labels, ctx.ignored)
        to_g, to_z = torch.empty_like(given), torch.empty_like(z)
        for rows in _chunks(len(z), z.shape[1], z):
            P = (z[rows] - sums[rows]).exp_()
            to_g[rows], to_z[rows] = _second(P, u[rows].clone(), g[rows], y[rows])
        return torch.where(labels == ctx.ignored, 0, to_g), to_z, None, None, None


class _OfHidden(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, y: Tensor, ignored: int) -> Tensor:
        losses, sums = h.new_empty(len(h)), h.new_empty(len(h), 1)
        for rows in _chunks(len(h), len(w), h):
            losses[rows], sums[rows] = _losses(h[rows] @ w.T, y[rows], ignored)
        ctx.save_for_backward(h, w, y, sums)
        ctx.ignored = ignored
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return *_HiddenGradient.apply(*gradients, *ctx.saved_tensors, ctx.ignored), None, None


class _HiddenGradient(Function):
    """With z' = g (P − 1_y): z' W for h and z'ᵀ h for W."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, h: Tensor, w: Tensor, y: Tensor, sums: Tensor, ignored: int
    ) -> tuple:
        ctx.save_for_backward(g, h, w, y, sums)
        ctx.ignored = ignored
        g, y = _weighed(g, y, ignored)
        gh, gw = torch.empty_like(h), torch.zeros_like(w)
        for rows in _chunks(len(h), len(w), h):
            P = (h[rows] @ w.T).sub_(sums[rows]).exp_()
            slope = _minus_one(P.mul_(g[rows]), g[rows], y[rows])
            gh[rows] = slope @ w
            gw.addmm_(slope.T, h[rows])
        return gh, gw

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents a, B of both: u = a Wᵀ + h Bᵀ is that of z', and the rest follows."""
        a, B = gradients
        given, h, w, labels, sums = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(h: Tensor, w: Tensor) -> Tensor:
                return _losses(h @ w.T, labels, ctx.ignored)[0]

            return *again(plain, (h, w), given, (a, B)), None, None, None
        g, y = _weighed(given, labels, ctx.ignored)
        to_g, to_h, to_w = torch.empty_like(given), torch.empty_like(h), torch.zeros_like(w)
        for rows in _chunks(len(h), len(w), h):
            P = (h[rows] @ w.T).sub_(sums[rows]).exp_()
            u = torch.addmm(a[rows] @ w.T, h[rows], B.T)
            to_g[rows], to_z = _second(P, u, g[rows], y[rows])
            slope = _minus_one(P.mul_(g[rows]), g[rows], y[rows])
            to_h[rows] = torch.addmm(to_z @ w, slope, B)
            to_w.addmm_(slope.T, a[rows]).addmm_(to_z.T, h[rows])
        return torch.where(labels == ctx.ignored, 0, to_g), to_h, to_w, None, None, None

"""Linear maps and look-ups whose gradient by the parameters need not be computed to be derived.

A gradient makes three products of matrices of a linear layer. A Hessian product needs eight: the
forward pass, the gradient by the inputs, and six for the derivatives of both. The gradient by the
weights, a ninth, has derivatives that do not contain its value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.wanted import Wanted


def linear(x: Tensor, w: Tensor, b: Tensor | None, wanted: Wanted) -> Tensor:
    """x Wᵀ + b.

    Args:
        x: Inputs `(…, in)` of at least two dimensions.
        w: Weights `(out, in)`.
        b: Bias `(out,)`, or none.
        wanted: Which derivatives of its gradient will be asked for.
    """
    return _Linear.apply(x, w, b, wanted)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, wanted: Wanted) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.wanted = wanted
        # A tensor of its own, no view, since the network may change it in place.
        y = x.new_empty(*x.shape[:-1], len(w))
        rows = x.flatten(0, -2), w.T
        if b is None:
            torch.mm(*rows, out=y.view(-1, len(w)))
        else:
            torch.addmm(b, *rows, out=y.view(-1, len(w)))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (g,) = gradients
        x, w = (t.detach() if ctx.wanted.only_g else t for t in ctx.saved_tensors)
        derivatives = _Gradient.apply(g, x, w, ctx.needs_input_grad[:3], ctx.wanted.valued)
        return *derivatives, None


class _Gradient(Function):
    """gx = g W, gW = gᵀx, gb = ∑ g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, needed: tuple, valued: bool) -> tuple:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        to_x, to_w, to_b = needed
        gx = g @ w if to_x else None
        if not valued:
            zero = w.new_zeros(())
            return gx, zero.expand_as(w) if to_w else None, zero.expand(len(w)) if to_b else None
        rows = g.flatten(0, -2)
        return gx, rows.T @ x.flatten(0, -2) if to_w else None, rows.sum(0) if to_b else None

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents u, z, c of gx, gW, gb: u Wᵀ + x zᵀ + c for g, g z for x, gᵀu for W."""
        u, z, c = gradients
        g, x, w = ctx.saved_tensors
        to_g, to_x, to_w, *_ = ctx.needs_input_grad
        dg = dx = dw = None
        if to_g and not (u is None and z is None and c is None):
            rows = g.new_zeros(g[..., 0].numel(), len(w)) if c is None else c.expand(*g.shape)
            rows = rows.reshape(-1, len(w))
            for a, b in ((u, w), (x, z)):
                if a is not None and b is not None:
                    rows = torch.addmm(rows, a.flatten(0, -2), b.T)
            dg = rows.view(g.shape)
        if to_x and z is not None:
            dx = g @ z
        if to_w and u is not None:
            dw = g.flatten(0, -2).T @ u.flatten(0, -2)
        return dg, dx, dw, None, None


def embedding(w: Tensor, ids: Tensor, wanted: Wanted) -> Tensor:
    """Rows of W by their numbers, `(…, width)`.

    Args:
        w: W `(words, width)`.
        ids: Numbers `(…)` of rows.
        wanted: Which derivatives of its gradient will be asked for.
    """
    return _Embedding.apply(w, ids, wanted)


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, ids: Tensor, wanted: Wanted) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.words, ctx.wanted = len(w), wanted
        return F.embedding(ids, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (g,) = gradients
        return _Rows.apply(g, *ctx.saved_tensors, ctx.words, ctx.wanted.valued), None, None


class _Rows(Function):
    """g added up in the rows that were looked up: linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, ids: Tensor, words: int, valued: bool) -> Tensor:
        ctx.save_for_backward(ids)
        if not valued:
            return g.new_zeros(()).expand(words, g.shape[-1])
        return torch.ops.aten.embedding_dense_backward(g, ids, words, -1, False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (ids,) = ctx.saved_tensors
        return gradients[0][ids], None, None, None

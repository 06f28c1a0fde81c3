"""Attention differentiated twice with no T × T matrix in memory.

Queries are taken in blocks. What is kept is q, k, v, the output and the logarithm of each row's
sum; the weights P of a block are computed from them whenever they are needed, as fused kernels do
(Dao et al. 2022, arXiv 2205.14135, App. B), here for the derivative of the gradient too. In one
block, with S = s q kᵀ the scores and o' the cotangent of the output:

    P = softmax S,    P' = o' vᵀ,    dS = P ∘ (P' − D),    D = ∑ⱼ P ∘ P',
    dq = s dS k,    dk = s dSᵀ q,    dv = Pᵀ o'.

For cotangents a, b, c of dq, dk, dv let M = s (a kᵀ + q bᵀ), R = ∑ⱼ P ∘ M, Q = P ∘ (M − R). Then
⟨a, dq⟩ + ⟨b, dk⟩ + ⟨c, dv⟩ = ⟨o', Q v + P c⟩, from which all else follows:

    o':  Q v + P c
    S:   G = P ∘ (E − ∑ⱼ P ∘ E),    E = P' ∘ (M − R) − D ∘ M + o' cᵀ
    q:   s (G k + dS b),    k:  s (Gᵀ q + dSᵀ a),    v:  Qᵀ o'
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.again import again

BLOCK, BLOCK_ON_CARD = 1 << 20, 1 << 24  # weights that are held at once


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """softmax(s q kᵀ + mask) v for `(…, T, h)`; the mask is boolean or added, and constant."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Attention.apply(q, k, v, mask, causal, scale)


class _Block(NamedTuple):
    """Some queries, and the keys that they see."""

    rows: slice
    keys: slice
    weights: Tensor  # P, or S where the rows' sums are not known


def _blocks(
    ctx: Any, q: Tensor, k: Tensor, mask: Tensor | None, sums: Tensor | None
) -> Iterator[_Block]:
    t, n = q.shape[-2], k.shape[-2]
    block = BLOCK_ON_CARD if q.is_cuda else BLOCK
    size = max(16, block // max(1, n * q[..., 0, 0].numel()))
    for start in range(0, t, size):
        rows = slice(start, min(t, start + size))
        keys = slice(0, min(n, rows.stop) if ctx.causal else n)
        S = (q[..., rows, :] * ctx.scale) @ k[..., keys, :].mT
        if ctx.causal:
            below = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril(start)
            S.masked_fill_(~below, -math.inf)
        if mask is not None:
            part = mask.expand(*mask.shape[:-2], t, n)[..., rows, keys]
            S = S.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else S.add_(part)
        yield _Block(rows, keys, S if sums is None else S.sub_(sums[..., rows, :]).exp_())


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        ctx.causal, ctx.scale = causal, scale
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        sums = q.new_empty(*q.shape[:-1], 1)
        for rows, keys, S in _blocks(ctx, q, k, mask, None):
            sums[..., rows, :] = total = S.logsumexp(-1, keepdim=True)
            out[..., rows, :] = S.sub_(total).exp_() @ v[..., keys, :]
        ctx.save_for_backward(q, k, v, mask, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        found = _Gradient.apply(*gradients, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return *found, None, None, None


class _Gradient(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sums: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple:
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(g, q, k, v, mask, sums)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, P in _blocks(ctx, q, k, mask, sums):
            o = g[..., rows, :]
            dv[..., keys, :] += P.mT @ o
            dS = _centred(o @ v[..., keys, :].mT, P).mul_(scale)
            dq[..., rows, :] = dS @ k[..., keys, :]
            dk[..., keys, :] += dS.mT @ q[..., rows, :]
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        g, q, k, v, mask, sums = ctx.saved_tensors
        a, b, c = gradients
        if torch.is_grad_enabled():
            math_only = torch.ops.aten._scaled_dot_product_attention_math
            plain = partial(math_only, attn_mask=mask, is_causal=ctx.causal, scale=ctx.scale)
            found = again(lambda *t: plain(*t)[0], (q, k, v), g, (a, b, c))
            return *found, None, None, None, None
        s = ctx.scale
        to_g, to_q, to_k, to_v = (torch.zeros_like(t) for t in (g, q, k, v))
        for rows, keys, P in _blocks(ctx, q, k, mask, sums):
            o, a_, q_ = g[..., rows, :], a[..., rows, :], q[..., rows, :]
            b_, k_, v_, c_ = (t[..., keys, :] for t in (b, k, v, c))
            M = torch.cat([a_, q_], -1) @ torch.cat([k_, b_], -1).mT.mul(s)
            R = (P * M).sum(-1, keepdim=True)
            dP = o @ v_.mT
            D = (P * dP).sum(-1, keepdim=True)
            Q = (M - R).mul_(P)
            to_g[..., rows, :] = Q @ v_ + P @ c_
            to_v[..., keys, :] += Q.mT @ o
            dS = (dP - D).mul_(P).mul_(s)
            E = dP.mul_(M - R).sub_(M.mul_(D)).add_(o @ c_.mT)
            G = _centred(E, P).mul_(s)
            to_q[..., rows, :] = G @ k_ + dS @ b_
            to_k[..., keys, :] += G.mT @ q_ + dS.mT @ a_
        return to_g, to_q, to_k, to_v, None, None, None, None


def _centred(t: Tensor, P: Tensor) -> Tensor:
    """P ∘ (t − ∑ⱼ P ∘ t), in the place of t."""
    return t.sub_((P * t).sum(-1, keepdim=True)).mul_(P)

"""Attention differentiated twice with no T × T matrix in memory.

Heads and queries are taken in blocks that a core's cache holds. Only q, k and v are kept; the
weights P of a block are computed from them whenever they are needed, as fused kernels do (Dao et
al. 2022, arXiv 2205.14135, App. B), here for the derivative of the gradient too. In one block, with
S = s q kᵀ and o' the cotangent of the output:

    P = softmax S,    P' = o' vᵀ,    dS = P ∘ (P' − D),    D = ∑ⱼ P ∘ P',
    dq = s dS k,    dk = s dSᵀ q,    dv = Pᵀ o'.

For cotangents a, b, c of dq, dk, dv let M = s (a kᵀ + q bᵀ), R = ∑ⱼ P ∘ M, Q = P ∘ (M − R). Then
⟨a, dq⟩ + ⟨b, dk⟩ + ⟨c, dv⟩ = ⟨o', Q v + P c⟩, from which all else follows:

    o':  Q v + P c
    S:   G = P ∘ (E − ∑ⱼ P ∘ E),    E = (P' − D) ∘ (M − R) + o' cᵀ
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

BLOCK, BLOCK_ON_CARD = 1 << 17, 1 << 24  # weights that are held at once, of several heads
ROWS, ROWS_ON_CARD = 32, 1024  # queries at once; the fewer, the less is computed above a diagonal


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention softmax(s q kᵀ + mask) v, `(…, T, h)`.

    Args:
        q: Queries `(…, T, m)`.
        k: Keys `(…, T', m)`.
        v: Values `(…, T', h)`.
        mask: `(T, T')` or as torch broadcasts it: boolean, or added to the scores; a constant.
        causal: Whether a query sees only the keys up to its own position.
        scale: s; None: 1/√m.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Attention.apply(q, k, v, mask, causal, scale)


class _Block(NamedTuple):
    """Some queries of some heads, and the keys that they see."""

    rows: tuple[slice, slice]
    keys: tuple[slice, slice]
    weights: Tensor  # P
    spare: list[Tensor]  # tables as large, to be written to


def _flat(t: Tensor) -> Tensor:
    """`(b, T, h)`, b the product of all dimensions before."""
    return t.reshape(-1, *t.shape[-2:]).contiguous()


def _blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, spare: int
) -> Iterator[_Block]:
    """The blocks of q `(b, T, h)`, scaled, and k `(b, n, h)`, one by one in the same memory."""
    (heads, t, _), n = q.shape, k.shape[1]
    block, rows = (BLOCK_ON_CARD, ROWS_ON_CARD) if q.is_cuda else (BLOCK, ROWS)
    step = min(t, rows)
    memory = q.new_empty(1 + spare, min(heads * step * n, max(block, step * n)))
    later = torch.ones(step, step, dtype=torch.bool, device=q.device).triu(1)
    for start in range(0, t, step):
        stop = min(t, start + step)
        seen = min(n, stop) if causal else n
        size = max(1, block // ((stop - start) * seen))
        for first in range(0, heads, size):
            some = slice(first, min(heads, first + size))
            shape = some.stop - first, stop - start, seen
            S, *others = (row[: math.prod(shape)].view(shape) for row in memory)
            torch.bmm(q[some, start:stop], k[some, :seen].mT, out=S)
            if causal and seen > start:
                S[..., start:].masked_fill_(later[: stop - start, : seen - start], -math.inf)
            if mask is not None:
                part = mask[some if len(mask) > 1 else slice(1), start:stop, :seen]
                S = S.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else S.add_(part)
            # Not by the logarithms of the rows' sums: beside a mask of -1e9 they would round away.
            blind = None if mask is None else S.amax(-1, keepdim=True) == -math.inf
            torch.softmax(S, -1, out=S)
            if blind is not None:  # a query that sees no key has weights of zero, as in torch
                S.masked_fill_(blind, 0)
            yield _Block((some, slice(start, stop)), (some, slice(seen)), S, others)


def _masks(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask for flat heads, `(b, T, n)`, or `(1, T, n)` for one that all share."""
    if mask is None:
        return None
    shape = q.shape[-2], k.shape[-2]
    if mask.shape[:-2].numel() > 1:
        return mask.expand(*q.shape[:-2], *shape).reshape(-1, *shape)
    return mask.reshape(1, *mask.shape[-2:]).expand(1, *shape)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        ctx.causal, ctx.scale = causal, scale
        q_, k_, v_, masks = _flat(q) * scale, _flat(k), _flat(v), _masks(mask, q, k)
        made = q.new_empty(*q.shape[:-1], v.shape[-1])  # no view: it may be changed in place
        out = made.view(*q_.shape[:2], -1)
        for rows, keys, P, _ in _blocks(q_, k_, masks, causal, 0):
            out[rows] = torch.bmm(P, v_[keys])
        ctx.save_for_backward(q, k, v, mask)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        gradients_ = _Gradient.apply(*gradients, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return *gradients_, None, None, None


class _Gradient(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple:
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(g, q, k, v, mask)
        o, q_, k_, v_ = _flat(g), _flat(q) * scale, _flat(k), _flat(v)
        dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
        masks = _masks(mask, q, k)
        for rows, keys, P, (dS, spare) in _blocks(q_, k_, masks, causal, 2):
            dv[keys].add_(torch.bmm(P.mT, o[rows]))
            torch.bmm(o[rows], v_[keys].mT, out=dS)
            _centred(dS, P, spare)
            dq[rows] = torch.bmm(dS, k_[keys]).mul_(scale)
            dk[keys].add_(torch.bmm(dS.mT, q_[rows]))
        return tuple(d.view_as(t) for d, t in ((dq, q), (dk, k), (dv, v)))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        g, q, k, v, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            math_only = torch.ops.aten._scaled_dot_product_attention_math
            plain = partial(math_only, attn_mask=mask, is_causal=ctx.causal, scale=ctx.scale)
            gradients_ = again(lambda *t: plain(*t)[0], (q, k, v), g, gradients)
            return *gradients_, None, None, None
        o, q_, k_, v_ = _flat(g), _flat(q) * ctx.scale, _flat(k), _flat(v)
        a, b, c = (_flat(t) for t in gradients)
        a = a * ctx.scale  # as q; what is for q is scaled at its end
        aq, kb = torch.cat([a, q_], -1), torch.cat([k_, b], -1)
        to_g, to_q = torch.empty_like(o), torch.empty_like(q_)
        to_k, to_v = torch.zeros_like(k_), torch.zeros_like(v_)
        masks = _masks(mask, q, k)
        for rows, keys, P, (M, dP, spare) in _blocks(q_, k_, masks, ctx.causal, 3):
            torch.bmm(aq[rows], kb[keys].mT, out=M)
            M.sub_(torch.mul(P, M, out=spare).sum(-1, keepdim=True))
            torch.bmm(o[rows], v_[keys].mT, out=dP)
            dP.sub_(torch.mul(P, dP, out=spare).sum(-1, keepdim=True))
            E = torch.mul(dP, M, out=spare).baddbmm_(o[rows], c[keys].mT)
            Q, dS = M.mul_(P), dP.mul_(P)
            to_g[rows] = torch.bmm(Q, v_[keys]).baddbmm_(P, c[keys])
            to_v[keys].add_(torch.bmm(Q.mT, o[rows]))
            G = _centred(E, P, Q)
            to_q[rows] = torch.bmm(G, k_[keys]).baddbmm_(dS, b[keys]).mul_(ctx.scale)
            to_k[keys].add_(torch.bmm(G.mT, q_[rows]).baddbmm_(dS.mT, a[rows]))
        gradients_ = ((to_g, g), (to_q, q), (to_k, k), (to_v, v))
        return *(d.view(t.shape) for d, t in gradients_), None, None, None


def _centred(t: Tensor, P: Tensor, spare: Tensor) -> Tensor:
    """P ∘ (t − ∑ⱼ P ∘ t), in the place of t."""
    return t.sub_(torch.mul(P, t, out=spare).sum(-1, keepdim=True)).mul_(P)

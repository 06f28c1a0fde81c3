"""The orthogonal map, order or move of heads that brings one set of weights nearest to another.

Each maximises an inner product that is linear in it: by the polar factor of the matrix of
correlations (Schönemann 1966) for rotations, by linear assignment for orders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lsa.maths.alignment.symmetries import HeadMove, Heads, Move, Order

ROUNDS = 10  # of heads within groups, and rotations that they share, in turn


def assignment(gains: Tensor) -> Tensor:
    """Column of each row, `(n,)`, with the largest sum of gains `(n, n)`."""
    return torch.from_numpy(linear_sum_assignment(gains.cpu().numpy(), maximize=True)[1])


def polar(correlations: Tensor) -> Tensor:
    """Orthogonal Q with the largest ⟨Q, C⟩, for each C `(…, n, n)`."""
    u, _, vh = torch.linalg.svd(correlations)
    return u @ vh


def nearest(freedom: str, correlations: Tensor, unsigned: Tensor) -> Move:
    """The move of a space with the largest ⟨move, C⟩.

    Args:
        freedom: Of the space.
        correlations: C `(n, n)`, its entry `[i, j]` of A's coordinate i with B's j.
        unsigned: The same of numbers that take no sign, `(n, n)`.
    """
    if freedom == "orthogonal":
        return polar(correlations)
    if freedom == "centred":
        centred = correlations - correlations.mean(0)
        centred = centred - centred.mean(1, keepdim=True)
        return polar(centred + centred.norm().clamp(min=1) / len(centred))
    signed = freedom == "signed"
    order = assignment((correlations.abs() if signed else correlations) + unsigned)
    signs = correlations[torch.arange(len(order)), order].sign() if signed else None
    ones = torch.ones(len(order), dtype=correlations.dtype)
    return Order(order, ones if signs is None else torch.where(signs == 0, ones, signs))


class HeadCorrelations(NamedTuple):
    """Correlations of A's heads with B's: groups g, h; query heads i, j; coordinates last."""

    query: Tensor  # (G, G, r, r, m, m)
    key: Tensor  # (G, G, m, m)
    value: Tensor  # (G, G, n, n)
    out: Tensor  # (G, G, r, r, n, n)


def nearest_heads(heads: Heads, c: HeadCorrelations) -> HeadMove:
    """The move of heads, its maps orthogonal, with the largest inner product."""
    groups = len(c.key)
    pairs = [[_pairing(heads, c, g, h) for h in range(groups)] for g in range(groups)]
    gains = torch.tensor([[p.gain for p in row] for row in pairs], dtype=torch.float64)
    order = assignment(gains)
    chosen = [pairs[g][int(h)] for g, h in enumerate(order)]
    return HeadMove(
        order,
        torch.stack([p.heads for p in chosen]),
        torch.stack([p.qk for p in chosen]),
        torch.stack([p.ov for p in chosen]),
    )


class _Pairing(NamedTuple):
    """B's group h in the place of A's g."""

    gain: float
    heads: Tensor
    qk: Tensor
    ov: Tensor


def _pairing(heads: Heads, c: HeadCorrelations, g: int, h: int) -> _Pairing:
    """Rotations of a group from its keys and values, then heads and rotations in turn."""
    query, key, value, out = (t[g, h] for t in c)
    r = len(query)
    at = torch.arange(r)
    if r == 1:
        inner, best = at, (key + query[0, 0], value + out[0, 0])
        m, n = head_map(heads, best[0]), _free(heads, best[1])
        return _Pairing(_inner(m, best[0]) + _inner(n, best[1]), inner, m, n)
    m, n = head_map(heads, key), _free(heads, value)
    result = None
    for _ in range(ROUNDS):
        inner = assignment((m * query).sum((-2, -1)) + (n * out).sum((-2, -1)))
        both = key + query[at, inner].sum(0), value + out[at, inner].sum(0)
        m, n = head_map(heads, both[0]), _free(heads, both[1])
        gain = _inner(m, both[0]) + _inner(n, both[1])
        if result and gain <= result.gain:
            break
        result = _Pairing(gain, inner, m, n)
    assert result
    return result


def _inner(a: Tensor, b: Tensor) -> float:
    return (a * b).sum().item()


def _free(heads: Heads, correlations: Tensor) -> Tensor:
    still = torch.eye(len(correlations)).to(correlations)
    return polar(correlations) if heads.mixes_values else still


def head_map(heads: Heads, correlations: Tensor) -> Tensor:
    """The orthogonal map of q and k, `(m, m)`, with the largest ⟨map, C⟩.

    Coordinates that the position turns in pairs can only be turned in the same planes.
    """
    result = torch.eye(len(correlations)).to(correlations)
    if not heads.mixes_scores:
        return result
    rest = heads.unpaired
    result[rest[:, None], rest] = polar(correlations[rest[:, None], rest])
    if len(heads.pairs):
        i, j = heads.pairs.T
        turning = torch.complex(
            correlations[i, i] + correlations[j, j], correlations[j, i] - correlations[i, j]
        )
        turn = torch.polar(torch.ones_like(turning.real), turning.angle())
        result[i, i], result[j, j] = turn.real, turn.real
        result[j, i], result[i, j] = turn.imag, -turn.imag
    return result

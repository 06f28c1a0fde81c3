"""Balanced heads: queries as large as keys, values as large as the output layer.

An invertible map may be moved from queries to keys, or from values to the output layer, without
changing the function. Balancing picks one such map, so that heads can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lsa.maths.alignment.symmetries import HeadMove, Heads, TensorAxis, unmoved

CONDITION = 1e8  # of the queries or keys of a head, beyond which it is not balanced


def balance(heads: Heads, tensors: Mapping[str, Tensor]) -> HeadMove | None:
    """The move that gives queries and keys the same second moment, and values and outputs too.

    The move is unique up to rotations. So two networks whose heads differ by any invertible map
    differ by rotations once both are balanced. M solves M P M = M⁻¹ K M⁻¹ for the second moments P
    of the queries and K of the keys, `(m, m)`: it is the root of the geometric mean of P⁻¹ and K.

    Args:
        heads: The heads of one attention.
        tensors: Parameters by name; those of `heads` are read.

    Returns:
        Maps of each group, its heads in their order; None where the moment of a head is singular
        to 1 part in 10⁸ (`CONDITION`).
    """
    move = unmoved(heads)
    assert isinstance(move, HeadMove)
    query, key, value, out = (
        coordinates(axes, tensors) for axes in (heads.query, heads.key, heads.value, heads.out)
    )
    for g in range(len(key)):
        moments = [_moment(t[g]) for t in (query, key, value, out)]
        qk, ov = move.qk[g], move.ov[g]
        if heads.mixes_scores:
            qk = _balancing_in_pairs(heads, moments[0], moments[1])
        if heads.mixes_values:
            ov = _balancing(moments[2], moments[3])
        if ov is None or qk is None:
            return None
        move.qk[g], move.ov[g] = qk, ov
    return move


def coordinates(axes: Iterable[TensorAxis], tensors: Mapping[str, Tensor]) -> Tensor:
    """Entries of the weights by group, head and coordinate.

    Returns:
        `(G, r, m, rest)` for queries and outputs, `(G, m, rest)` for keys and values; `rest` runs
        over the other axis of all weights and biases.
    """
    parts = []
    for axis in axes:
        assert axis.index is not None
        parts.append(axis.rows(tensors[axis.name]).reshape(*axis.index.shape, -1))
    return torch.cat(parts, -1)


def _moment(rows: Tensor) -> Tensor:
    """∑ x xᵀ of coordinates `(…, m, rest)`, `(m, m)`."""
    each = rows @ rows.mT
    return each.sum(0) if each.ndim == 3 else each


def _balancing(p: Tensor, k: Tensor) -> Tensor | None:
    """Symmetric G > 0 with G P G = G⁻¹ K G⁻¹: the root of the geometric mean of P⁻¹ and K."""
    if not len(p):
        return p
    for moment in (p, k):
        ends = torch.linalg.eigvalsh(moment)[[0, -1]]
        if not ends[0] * CONDITION > ends[1]:
            return None
    root = _power(p, 0.5)
    less = _power(p, -0.5)
    return _power(less @ _power(root @ k @ root, 0.5) @ less, 0.5)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of a symmetric positive matrix `(m, m)`."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp(min=0) ** exponent @ vectors.mT


def _balancing_in_pairs(heads: Heads, p: Tensor, k: Tensor) -> Tensor | None:
    """The balancing map for coordinates turned in pairs: one factor for each pair."""
    result, rest, pairs = torch.zeros_like(p), heads.unpaired, heads.pairs
    among = _balancing(p[rest[:, None], rest], k[rest[:, None], rest])
    if among is None:
        return None
    result[rest[:, None], rest] = among
    sizes = [m.diagonal()[pairs].sum(1) for m in (p, k)]
    if len(pairs) and not min(s.min() for s in sizes) > 0:
        return None
    factors = (sizes[1] / sizes[0]) ** 0.25
    for pair, factor in zip(pairs, factors, strict=True):
        result[pair, pair] = factor
    return result


def inverse(move: HeadMove) -> HeadMove:
    """The move that undoes another, which keeps the order of heads."""
    return move._replace(qk=torch.linalg.inv(move.qk), ov=torch.linalg.inv(move.ov))

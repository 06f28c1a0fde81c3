"""Changes of the weights of a transformer that keep its function, and how they are carried out.

Coordinates of intermediate results lie on axes of the weights that make and take them. A `Space` is
a set of coordinates that may be changed together: the residual stream, or the hidden units of an
MLP. What is free depends on what reads it (Theus et al. 2025, arXiv 2506.22712): the order of units
behind an activation; any rotation of a stream that only RMS norms read, once their gains are put
into the layers behind them; those that keep the mean, behind layer norms. In `Heads` of attention
the scores qᵀk and the sums over v stay where q ↦ Mq, k ↦ M⁻ᵀk, v ↦ Nv and the output layer undoes
N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

FREEDOMS = ("orthogonal", "centred", "signed", "permutation")  # from the largest to the least
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TensorAxis:
    """An axis of a tensor on which coordinates lie: all of it, in order, or at an index.

    The index has any shape; coordinates are numbered through it, the last index fastest.
    """

    name: str
    dim: int
    index: Tensor | None = None
    reads: bool = False  # coordinates are taken here, and not made

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor's entries by coordinate, `(n, rest)`."""
        moved = tensor.movedim(self.dim, 0)
        if self.index is not None:
            moved = moved[self.index.flatten().to(moved.device)]
        return moved.reshape(len(moved), -1)

    def replaced(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """A copy of the tensor with the rows `(n, rest)` in place of those that `rows` returns."""
        moved = tensor.movedim(self.dim, 0).clone()
        if self.index is None:
            moved = rows.reshape(moved.shape)
        else:
            at = self.index.flatten().to(moved.device)
            moved[at] = rows.reshape(len(at), *moved.shape[1:])
        return moved.movedim(0, self.dim).contiguous()


@dataclass(frozen=True)
class Norm:
    """A normalisation whose gain γ (and shift) may be put into the layers that read it."""

    weight: str
    bias: str | None
    readers: tuple[TensorAxis, ...]  # axis of the stream in each
    folds: bool = True  # nothing else reads it, and no reader is tied to another use


@dataclass(frozen=True)
class Space:
    """Coordinates that change together, and what may be done with them.

    `orthogonal`: any rotation; `centred`: any that keeps the vector of ones; `signed`: order and
    signs; `permutation`: order.
    """

    name: str
    size: int
    axes: tuple[TensorAxis, ...]
    magnitudes: tuple[TensorAxis, ...] = ()  # gains of norms, which take no sign
    norms: tuple[Norm, ...] = ()
    freedom: str = "permutation"


@dataclass(frozen=True)
class Heads:
    """Heads of one attention, G groups of r query heads that share keys and values."""

    name: str
    query: tuple[TensorAxis, ...]  # index (G, r, m): weight, and bias where there is one
    key: tuple[TensorAxis, ...]  # (G, m)
    value: tuple[TensorAxis, ...]  # (G, n)
    out: tuple[TensorAxis, ...]  # (G, r, n): columns of the output layer
    pairs: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    """Coordinates `(p, 2)` of a head that are turned together by the position (RoPE)."""
    mixes_scores: bool = True  # coordinates of queries and keys may be mixed
    mixes_values: bool = True  # coordinates of values may be mixed

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """G, r, m, n."""
        q, o = self.query[0].index, self.out[0].index
        assert q is not None and o is not None
        return q.shape[0], q.shape[1], q.shape[2], o.shape[2]

    @property
    def unpaired(self) -> Tensor:
        """Coordinates of queries that no position turns, `(m − 2p,)`."""
        free = torch.ones(self.shape[2], dtype=torch.bool)
        free[self.pairs.flatten()] = False
        return free.nonzero().flatten()

    @property
    def axes(self) -> tuple[TensorAxis, ...]:
        """Axes of queries, keys, values and outputs."""
        return (*self.query, *self.key, *self.value, *self.out)


class Order(NamedTuple):
    """New coordinate i is old coordinate `order[i]`, times its sign."""

    order: Tensor  # (n,)
    signs: Tensor  # (n,)


class HeadMove(NamedTuple):
    """New group g is old `groups[g]`, its query head i the old `heads[g, i]`; q ↦ Mq, v ↦ Nv."""

    groups: Tensor  # (G,)
    heads: Tensor  # (G, r)
    qk: Tensor  # (G, m, m): M
    ov: Tensor  # (G, n, n): N


Move = Tensor | Order | HeadMove
"""Of a space, a matrix `(n, n)` or an order; of heads, their move."""


@dataclass(frozen=True)
class Symmetries:
    """All symmetries of a network, and a line for each part that was left out."""

    spaces: tuple[Space, ...] = ()
    heads: tuple[Heads, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Space | Heads]:
        """Spaces and heads by name."""
        return {part.name: part for part in (*self.spaces, *self.heads)}

    @property
    def names(self) -> list[str]:
        """Tensors that change."""
        axes = [p for part in self.parts.values() for p in part.axes]
        gains = [p for space in self.spaces for p in space.magnitudes]
        return list(dict.fromkeys(p.name for p in (*axes, *gains)))


def unmoved(part: Space | Heads, dtype: torch.dtype = torch.float64) -> Move:
    """The move that changes nothing: a matrix `(n, n)`, an order `(n,)`, or maps of all heads."""
    if isinstance(part, Space):
        if part.freedom in ("orthogonal", "centred"):
            return torch.eye(part.size, dtype=dtype)
        return Order(torch.arange(part.size), torch.ones(part.size, dtype=dtype))
    groups, r, m, n = part.shape
    return HeadMove(
        torch.arange(groups),
        torch.arange(r).repeat(groups, 1),
        torch.eye(m, dtype=dtype).repeat(groups, 1, 1),
        torch.eye(n, dtype=dtype).repeat(groups, 1, 1),
    )


def apply(
    parts: Iterable[Space | Heads], moves: Mapping[str, Move], tensors: Mapping[str, Tensor]
) -> Tensors:
    """Tensors with every part moved, for norms whose gains are 1 (`with_gains(…, None)`).

    The result is linear in the tensors.

    Args:
        parts: Spaces and heads that move.
        moves: Name of a part → its move.
        tensors: Parameters by name; a tensor of a part that is not among them is left out.

    Returns:
        All the tensors: new ones of the parts, the others as they were given.
    """
    moved = dict(tensors)
    for part in parts:
        move = moves[part.name]
        if isinstance(part, Heads):
            assert isinstance(move, HeadMove)
            _move_heads(part, move, moved)
            continue
        assert not isinstance(move, HeadMove)
        for axis in part.axes:
            if axis.name in moved:
                tensor = moved[axis.name]
                moved[axis.name] = axis.replaced(tensor, _turned(axis.rows(tensor), move))
        for axis in part.magnitudes:
            if isinstance(move, Order) and axis.name in moved:
                tensor = moved[axis.name]
                moved[axis.name] = axis.replaced(tensor, axis.rows(tensor)[move.order])
    return moved


def _turned(rows: Tensor, move: Tensor | Order) -> Tensor:
    if isinstance(move, Order):
        return rows[move.order] * move.signs.to(rows).unsqueeze(1)
    return move.to(rows) @ rows


def _move_heads(heads: Heads, move: HeadMove, tensors: Tensors) -> None:
    groups, r, m, n = heads.shape
    at, inner = move.groups, move.heads
    kinds = (
        (heads.query, (groups, r, m), move.qk.unsqueeze(1)),
        (heads.key, (groups, m), torch.linalg.inv(move.qk).mT),
        (heads.value, (groups, n), move.ov),
        (heads.out, (groups, r, n), torch.linalg.inv(move.ov).mT.unsqueeze(1)),
    )
    for axes, shape, matrix in kinds:
        for axis in axes:
            if axis.name not in tensors:
                continue
            tensor = tensors[axis.name]
            rows = axis.rows(tensor)
            old = rows.reshape(*shape, -1)[at]
            if len(shape) == 3:
                old = old[torch.arange(groups).unsqueeze(1), inner]
            new = matrix.to(rows) @ old
            tensors[axis.name] = axis.replaced(tensor, new.reshape(rows.shape))


def gains(symmetries: Symmetries, tensors: Mapping[str, Tensor]) -> Tensors:
    """The gains `(n,)` of the norms that may be put into the layers behind them, by name."""
    norms = [n for space in symmetries.spaces for n in space.norms if n.folds]
    return {norm.weight: tensors[norm.weight] for norm in norms}


def with_gains(
    symmetries: Symmetries, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor] | None
) -> Tensors:
    """Parameters of the same function with other gains of the norms that `gains` returns.

    What a gain is divided by, the layers that read the norm are multiplied by.

    Args:
        symmetries: Of the network.
        tensors: Its parameters.
        wanted: Name of a norm's gain → its new value `(n,)`; None: ones.
    """
    changed = dict(tensors)
    for norm in (n for space in symmetries.spaces for n in space.norms if n.folds):
        gain = changed[norm.weight]
        new = torch.ones_like(gain) if wanted is None else wanted[norm.weight].to(gain)
        factor = gain / new
        for reader in norm.readers:
            rows = reader.rows(changed[reader.name])
            scaled = rows * factor.unsqueeze(1)
            changed[reader.name] = reader.replaced(changed[reader.name], scaled)
        if norm.bias:
            changed[norm.bias] = changed[norm.bias] / factor
        changed[norm.weight] = new.clone()
    return changed


def transformed(
    symmetries: Symmetries, moves: Mapping[str, Move], tensors: Mapping[str, Tensor]
) -> Tensors:
    """Parameters of the same function after moves of all parts; the norms keep their gains.

    Args:
        symmetries: Of the network.
        moves: Name of each part → its move: `(n, n)`, an `Order` or a `HeadMove`.
        tensors: Parameters by name.
    """
    folded = with_gains(symmetries, tensors, None)
    moved = apply(symmetries.parts.values(), moves, folded)
    return with_gains(symmetries, moved, gains(symmetries, tensors))

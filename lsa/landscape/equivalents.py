"""Other weights of a transformer with the same function, for what should not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.landscape.landscape import Landscape
from lsa.landscape.recognition import rounding, symmetries
from lsa.landscape.symmetries import TRIAL
from lsa.maths.alignment.random_moves import random_moves
from lsa.maths.alignment.symmetries import (
    HeadMove,
    Heads,
    Move,
    Order,
    Space,
    apply,
    unmoved,
)

Carry = Callable[[Tensor], Tensor]


class Equivalent(NamedTuple):
    """A change: its name, θ after it `(d,)`, and what it does to a vector like θ."""

    name: str
    theta: Tensor
    carry: Carry


def equivalents(
    landscape: Landscape, theta: Tensor, factor: float, rng: torch.Generator
) -> tuple[list[Equivalent], str]:
    """Four changes of a transformer's weights, each linear in θ; and which parts they are of.

    rescaled_layers: queries × factor and keys ÷ factor, values ÷ factor and the output layer
    × factor, for the next attention the other way round, and hidden units of homogeneous
    activations; rescaled_units: by random factors of each head and unit; permuted: heads, units and
    the residual stream reordered; rotated: coordinates within each head.

    Args:
        landscape: In float64.
        theta: Where the symmetries are tried, `(d,)`.
        factor: Of the rescaling.
        rng: Source of factors, orders and rotations.

    Raises:
        InputError: No symmetry is recognised.
    """
    known = symmetries(landscape, theta)
    plain = replace(known, spaces=tuple(_reordered(s) for s in known.spaces))
    moves = random_moves(plain, rng, stretch=0.0)
    still = {name: unmoved(part) for name, part in plain.parts.items()}
    mixing = [h for h in plain.heads if h.mixes_scores or h.mixes_values]
    most = rounding(landscape, theta)
    units = [s for s in plain.spaces if _is_homogeneous(landscape, theta, s, most)]

    def linear(
        parts: list[Space | Heads], changes: Mapping[str, Move]
    ) -> Callable[[Tensor], Tensor]:
        def carry(v: Tensor) -> Tensor:
            moved = apply(parts, changes, landscape.unflatten(v))
            return torch.cat([t.reshape(-1) for t in moved.values()])

        return carry

    made = []
    for name, scales in (("rescaled_layers", None), ("rescaled_units", rng)):
        heads = {h.name: _scaled(h, factor ** (-1) ** i, scales) for i, h in enumerate(mixing)}
        scaled = linear([*mixing], heads)(theta)
        for i, space in enumerate(units):
            sizes = torch.full((space.size,), factor ** (-1) ** i, dtype=theta.dtype)
            if scales:
                sizes = factor ** (2 * torch.rand(space.size, generator=rng).to(theta) - 1)
            scaled = _rescaled(landscape, scaled, space, sizes)
        if mixing or units:
            made.append(Equivalent(name, scaled, lambda v: v))
    parts = list(plain.parts.values())
    orders: dict[str, Move] = {n: _order_of(moves[n], still[n]) for n in still}
    permuted = linear(parts, orders)
    made.append(Equivalent("permuted", permuted(theta), permuted))
    if mixing:
        turns: dict[str, Move] = {h.name: _turn_of(moves[h.name], still[h.name]) for h in mixing}
        rotated = linear([*mixing], turns)
        made.append(Equivalent("rotated", rotated(theta), rotated))
    return made, ", ".join(_names(mixing, units))


def _names(heads: list[Heads], units: list[Space]) -> Iterator[str]:
    yield from (part.name for part in heads)
    yield from (part.name for part in units)


def _reordered(space: Space) -> Space:
    """The space with no more freedom than its order, and gains that move with it."""
    norms = tuple(replace(norm, folds=False) for norm in space.norms)
    return replace(space, freedom="permutation", norms=norms)


def _scaled(heads: Heads, factor: float, rng: torch.Generator | None) -> HeadMove:
    """Queries and output layer times a factor, keys and values by it; random: for each group."""
    move = unmoved(heads)
    assert isinstance(move, HeadMove)
    sizes = torch.full((2, len(move.groups)), factor, dtype=torch.float64)
    sizes[1] = 1 / sizes[1]
    if rng:
        sizes = factor ** (2 * torch.rand(2, len(move.groups), generator=rng).double() - 1)
    q, v = sizes[:, :, None, None]
    qk = move.qk * q if heads.mixes_scores else move.qk
    return move._replace(qk=qk, ov=move.ov * v if heads.mixes_values else move.ov)


def _order_of(move: Move, still: Move) -> Move:
    if isinstance(move, HeadMove) and isinstance(still, HeadMove):
        return still._replace(groups=move.groups, heads=move.heads)
    assert isinstance(move, Order)
    return move


def _turn_of(move: Move, still: Move) -> Move:
    assert isinstance(move, HeadMove) and isinstance(still, HeadMove)
    return still._replace(qk=move.qk, ov=move.ov)


def _is_homogeneous(landscape: Landscape, theta: Tensor, space: Space, most: float) -> bool:
    """Whether units may be scaled where they are made, and unscaled where they are read.

    Args:
        landscape: In float64.
        theta: Where it is tried, `(d,)`.
        space: The units.
        most: Relative change of a loss that is none.
    """
    if space.norms or not any(p.reads for p in space.axes):
        return False
    before = landscape.losses(theta) if landscape.has_samples else None
    for trial in (TRIAL, 1 / TRIAL):
        sizes = torch.full((space.size,), trial, dtype=theta.dtype)
        other = _rescaled(landscape, theta, space, sizes)
        if before is None:
            loss = landscape.loss(theta)
            gap, scale = abs(landscape.loss(other) - loss), abs(loss)
        else:
            gap = (landscape.losses(other) - before).abs().max().item()
            scale = before.abs().max().item()
        if not gap <= most * scale:
            return False
    return True


def _rescaled(landscape: Landscape, theta: Tensor, space: Space, sizes: Tensor) -> Tensor:
    tensors = dict(landscape.unflatten(theta))
    for axis in space.axes:
        rows = axis.rows(tensors[axis.name])
        factor = (1 / sizes if axis.reads else sizes).to(rows).unsqueeze(1)
        tensors[axis.name] = axis.replaced(tensors[axis.name], rows * factor)
    return torch.cat([t.reshape(-1) for t in tensors.values()])

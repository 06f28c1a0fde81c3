"""Blocks of θ: layers, groups of layers, and queries, keys and values of one fused layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsa.landscape.head_rows import UnknownError, heads_of
from lsa.landscape.landscape import Landscape
from lsa.landscape.recognition import recorded
from lsa.maths.alignment.symmetries import Heads, TensorAxis
from lsa.maths.differences import Derivative
from lsa.runtime.errors import InputError

KINDS = ("query", "key", "value")


def blocks(names: Iterable[str], depth: int) -> dict[str, list[str]]:
    """Block → its parameters, in the network's order: those of modules with the same first names.

    A parameter outside all modules is a block of its own.

    Args:
        names: Of the parameters, such as `stage1.0.conv.weight`.
        depth: Parts of the module's name that count; 0: all of them, so that a block is a layer.
    """
    members: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1]
        members.setdefault(".".join(module[: depth or None]) or name, []).append(name)
    return members


@dataclass(frozen=True)
class Slice:
    """A part of θ: parameters, and which of their entries; None: all."""

    names: list[str]
    entries: Tensor | None = None  # (n,) in these parameters one behind the other


def parted(landscape: Landscape, theta: Tensor, named: Mapping[str, list[str]]) -> dict[str, Slice]:
    """Blocks, with a layer that makes queries, keys and values at once split in three.

    The rows of each are read from a forward pass. A layer whose heads are not recognised stays one
    block.

    Args:
        landscape: Of the network.
        theta: θ `(d,)`.
        named: Block → its parameters, from `blocks`.
    """
    shapes = {name: tuple(t.shape) for name, t in landscape.unflatten(theta).items()}
    fused = {p.name: h for h in _heads(landscape, theta) for p in h.query if p in _shared(h)}
    result: dict[str, Slice] = {}
    for block, names in named.items():
        owner = next((fused[name] for name in names if name in fused), None)
        if owner is None or {p.name for p in owner.query} != set(names):
            result[block] = Slice(list(names))
            continue
        for kind in KINDS:
            axes: dict[str, TensorAxis] = {p.name: p for p in getattr(owner, kind)}
            entries = _entries({name: shapes[name] for name in names}, axes)
            result[f"{block}.{kind}"] = Slice(list(names), entries)
    return result


def _heads(landscape: Landscape, theta: Tensor) -> list[Heads]:
    """Attentions of a network whose heads are recognised."""
    try:
        flow = recorded(landscape, theta)
    except InputError:  # no matter: blocks stay whole
        return []
    heads = []
    for attention in flow.attentions:
        try:
            heads.append(heads_of(flow, attention))
        except UnknownError:
            continue
    return heads


def _shared(heads: Heads) -> tuple[TensorAxis, ...]:
    """Places of queries whose tensor makes keys and values too."""
    others = [{p.name for p in axes} for axes in (heads.key, heads.value)]
    return tuple(p for p in heads.query if all(p.name in names for names in others))


def _entries(shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, TensorAxis]) -> Tensor:
    """Positions of these places in parameters one behind the other, in order."""
    start, entries = 0, []
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        if name in axes:
            at = torch.arange(n).view(shape)
            entries.append(start + axes[name].rows(at).flatten())
        start += n
    return torch.cat(entries).sort().values


def owners(landscape: Landscape, theta: Tensor, named: Mapping[str, Slice]) -> Tensor:
    """Index of the block that each coordinate of θ belongs to, `(d,)` int64.

    Args:
        landscape: Of the network.
        theta: θ `(d,)`.
        named: Block → its part of θ, from `parted`.
    """
    sizes = {name: t.numel() for name, t in landscape.unflatten(theta).items()}
    at = dict(zip(sizes, torch.arange(len(theta)).split(list(sizes.values())), strict=True))
    of = torch.zeros(len(theta), dtype=torch.int64)
    for i, piece in enumerate(named.values()):
        mine = torch.cat([at[name] for name in sizes if name in piece.names])
        of[mine if piece.entries is None else mine[piece.entries]] = i
    return of.to(theta.device)


class SlicedProduct:
    """v ↦ (H v)_s for v on some entries s, `(n,)`: the diagonal block of them."""

    def __init__(self, product: Any, theta: Tensor, entries: Tensor) -> None:
        self._product, self._theta = product, theta
        self._entries = entries.to(theta.device)

    @property
    def noise(self) -> float:
        """Largest error so far of a product with a vector of length 1."""
        return getattr(self._product, "noise", 0.0)

    def spread(self, v: Tensor) -> Tensor:
        """v on its entries and 0 on the others, `(d,)`."""
        return v.new_zeros(len(self._theta)).index_copy(0, self._entries, v)

    def __call__(self, v: Tensor) -> Tensor:
        """The product, `(n,)`."""
        return self._product(self.spread(v))[self._entries]

    def measured(self, v: Tensor) -> Derivative:
        """The product `(b,)` with a vector `(b,)` of the block, and its error."""
        value, error = self._product.measured(self.spread(v))
        return Derivative(value[self._entries], error)

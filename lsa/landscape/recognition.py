"""The symmetries of a network, recognised from one forward pass and then tried.

No module is known by its name or class: `Dataflow` sees which parameter reads what which other has
written. Which rows of a fused projection belong to which head, and which of them a rotary embedding
turns together, is read from derivatives of queries, keys and values by what the projection gives.
Every symmetry is then tried with a random move in float64; what changes the outputs is none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lsa.landscape.dataflow import Attended, Axis, Dataflow, classes
from lsa.landscape.landscape import Landscape
from lsa.maths.alignment.symmetries import (
    FREEDOMS,
    Heads,
    Norm,
    Place,
    Space,
    Symmetries,
    random_moves,
    transformed,
)
from lsa.runtime.errors import InputError

ROUNDING = 1e-9  # relative change of an output in float64 that is none
SINGLE = 1e-5  # and where a part of the network computes in float32 whatever it is given
NOISE = 0.1  # that θ gets for the trial, relative to the size of each tensor
FEW = 2  # samples that are passed, where the data are tensors


def symmetries(landscape: Landscape, theta: Tensor) -> Symmetries:
    """The symmetries of the network of a landscape, each tried at θ `(d,)`.

    A network may declare its own in an attribute `symmetries`, a `Symmetries`; those are tried too.

    Raises:
        InputError: None is left.
    """
    double = landscape.double()
    theta = theta.double()
    declared = getattr(landscape.model, "symmetries", None)
    flow = recorded(double, theta)
    if declared is None:
        declared = recognised(flow)
    elif not isinstance(declared, Symmetries):
        raise InputError(
            f"the network's attribute symmetries is a {type(declared).__name__}; give "
            "lsa.maths.alignment.symmetries.Symmetries"
        )
    tried = _tried(double, theta, declared, SINGLE if flow.single_precision else ROUNDING)
    if not tried.parts:
        raise InputError(
            "no symmetry of this network was recognised"
            + "".join(f"; {line}" for line in tried.left_out)
        )
    return tried


def recorded(landscape: Landscape, theta: Tensor) -> Dataflow:
    """What one forward pass shows; its graph is kept."""
    theta = theta.detach().requires_grad_()
    shapes = {name: tuple(t.shape) for name, t in landscape.unflatten(theta).items()}
    flow = Dataflow(landscape.model, theta, shapes)
    part = landscape.data.few(landscape.network, FEW)
    with landscape.network.at(theta), torch.enable_grad(), flow:
        part.both(theta)
    return flow


def recognised(flow: Dataflow) -> Symmetries:
    """What a forward pass shows, not tried yet; with the largest freedom first."""
    heads, left_out = [], []
    for attention in flow.attentions:
        try:
            heads.append(_heads(flow, attention))
        except _UnknownError as error:
            left_out.append(f"heads are left as they are: {error}")
    inside = {(p.name, p.dim) for h in heads for p in h.places}
    spaces = [_space(flow, axes) for axes in classes(flow.joined)]
    apart = [s for s in spaces if s and not inside & {(p.name, p.dim) for p in s.places}]
    return Symmetries(tuple(apart), tuple(heads), tuple(dict.fromkeys(left_out)))


# --- spaces ---------------------------------------------------------------------------------------


def _space(flow: Dataflow, axes: list[Axis]) -> Space | None:
    """Axes that are joined, where something reads them that something else writes."""
    axes = [axis for axis in axes if axis[0] in flow.shapes]
    sizes = {axis: flow.shapes[axis[0]][axis[1]] for axis in axes}
    if not any(flow.reads.get(axis) for axis in axes):
        return None
    n = min(sizes.values())
    if n < 2 or any(size % n for size in sizes.values()):
        return None
    norms = [norm for norm in flow.norms if (norm.weight, 0) in sizes]
    gains = {norm.weight for norm in norms}
    places = [
        Place(name, dim, None if size == n else torch.arange(n) + part * n)
        for (name, dim), size in sizes.items()
        if name not in gains
        for part in range(size // n)
    ]
    folding = tuple(
        Norm(
            norm.weight,
            norm.bias,
            tuple(Place(name, dim) for name, dim in dict.fromkeys(norm.readers)),
            norm.alone and all(flow.uses[name] == 1 for name, _ in norm.readers),
        )
        for norm in {norm.weight: norm for norm in norms}.values()
    )
    twice = Counter(norm.weight for norm in norms)
    folding = tuple(replace(f, folds=f.folds and twice[f.weight] == 1) for f in folding)
    magnitudes = tuple(Place(name, 0) for name in gains)
    made = [name for name in flow.shapes for axis in sizes if axis[0] == name and axis in flow.made]
    first = next(name for name in flow.shapes if any(axis[0] == name for axis in sizes))
    name = f"stream of {first}" if norms else f"units of {made[0] if made else first}"
    rotates = all(norm.folds for norm in folding)
    freedom = "orthogonal" if rotates else "signed"
    return Space(name, n, tuple(places), magnitudes, folding, freedom)


# --- heads ----------------------------------------------------------------------------------------


class _UnknownError(Exception):
    """An attention is not made as is known here."""


def _heads(flow: Dataflow, attention: Attended) -> Heads:
    """Heads of one attention, by the rows of its projections."""
    q, k, v = attention.query, attention.key, attention.value
    if any(t.ndim != 4 for t in (q, k, v)) or q.shape[2] < 2:
        raise _UnknownError("attention is not over (batch, heads, places, width)")
    axes = [flow.single(t) for t in (q, k, v)]
    if None in axes or len(attention.readers) != 1:
        raise _UnknownError("more than one layer makes or reads one part of attention")
    rows, plain = [], True
    for axis, t in zip(axes, (q, k, v), strict=True):
        assert axis
        found, same = _rows(flow.made[axis], t)
        rows.append(found)
        plain &= same or t is v
        if t is v and not same:
            raise _UnknownError("values are changed on their way to attention")
    groups = _groups(rows[1])
    r, rest = divmod(q.shape[1], len(groups))
    if rest or any(len(members) * len(k[0]) != len(members) * k.shape[1] for members in groups):
        raise _UnknownError("keys are shared by numbers of heads that differ")
    first = [members[0] for members in groups]
    if k.shape[1] == q.shape[1]:
        members = torch.tensor(groups)
    else:  # attention itself repeats keys for the queries of a group
        members = torch.arange(q.shape[1]).reshape(len(groups), r)
    out_axis, given = attention.readers[0]
    columns = _columns(attention.result, given)
    places = [
        _places(flow, axis, index)
        for axis, index in zip(
            axes, (rows[0][members], rows[1][first], rows[2][first]), strict=True
        )
        if axis
    ]
    return Heads(
        f"heads of {out_axis[0]}",
        *places,
        (Place(*out_axis, columns[members]),),
        _pairs(flow.made[axes[0]], q, rows[0][0]) if plain else torch.empty(0, 2).long(),
        mixes_scores=plain,
    )


def _places(flow: Dataflow, axis: Axis, index: Tensor) -> tuple[Place, ...]:
    bias = flow.biases.get(axis)
    own = Place(axis[0], axis[1], index)
    return (own, Place(bias, 0, index)) if bias else (own,)


def _groups(rows: Tensor) -> list[list[int]]:
    """Heads that have the same rows, `(heads, m)`."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows.tolist()):
        members.setdefault(tuple(row), []).append(i)
    return list(members.values())


def _rows(made: Tensor, heads: Tensor) -> tuple[Tensor, bool]:
    """Row of the projection that is each coordinate of each head, `(H, m)`, at the first place.

    And whether it is that row as it is; behind a norm of each head it depends on all of its rows.
    """
    m = heads.shape[-1]
    codes = torch.arange(1.0, m + 1, dtype=made.dtype, device=made.device)
    rows, plain = [], True
    for head in heads[0, :, 0]:
        derivative = _derivative((head * codes).sum(), made)
        at = derivative.nonzero().flatten()
        if len(at) != m:
            raise _UnknownError("a head does not have rows of its projection for itself")
        order = derivative[at].argsort()
        same = torch.equal(derivative[at][order], codes)
        rows.append(at[order] if same else at)
        plain &= same
    return torch.stack(rows).cpu(), plain


def _derivative(value: Tensor, by: Tensor) -> Tensor:
    """By the last axis, summed over the others."""
    (derivative,) = torch.autograd.grad(value, by, retain_graph=True, allow_unused=True)
    if derivative is None:
        raise _UnknownError("attention does not depend on its projection")
    return derivative.reshape(-1, by.shape[-1]).sum(0)


def _columns(result: Tensor, given: Tensor) -> Tensor:
    """Column of the output layer that reads each coordinate of each head, `(H, n)`."""
    codes = torch.arange(1.0, given.shape[-1] + 1, dtype=given.dtype, device=given.device)
    first = given.reshape(-1, given.shape[-1])[0]
    (derivative,) = torch.autograd.grad((first * codes).sum(), result, retain_graph=True)
    columns = derivative[0, :, 0].round().long() - 1
    if not torch.equal(columns.flatten().sort().values.cpu(), torch.arange(columns.numel())):
        raise _UnknownError("what heads give is changed on its way to the output layer")
    return columns.cpu()


def _pairs(made: Tensor, query: Tensor, rows: Tensor) -> Tensor:
    """Coordinates of a head that its position turns together, `(p, 2)`."""
    pairs = set[tuple[int, ...]]()
    for j in range(query.shape[-1]):
        derivative = _derivative(query[0, 0, 1, j], made).cpu()
        mixed = derivative[rows].abs() > 1e-14
        mixed[j] = True
        if mixed.sum() > 2:
            raise _UnknownError("the position mixes more than two coordinates of a head")
        if mixed.sum() == 2:
            pairs.add(tuple(mixed.nonzero().flatten().tolist()))
    found = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)
    if len(found.unique()) != found.numel():
        raise _UnknownError("the position mixes more than two coordinates of a head")
    return found


# --- trial ----------------------------------------------------------------------------------------


def _tried(
    landscape: Landscape, theta: Tensor, known: Symmetries, rounding: float
) -> Symmetries:
    """Those that keep the function, each with the largest freedom that does."""
    rng = torch.Generator().manual_seed(0)
    theta = _generic(landscape, theta, rng)
    tensors = landscape.unflatten(theta)
    before = _outputs(landscape, theta)

    def keeps(part: Space | Heads) -> bool:
        alone = Symmetries(*(((part,), ()) if isinstance(part, Space) else ((), (part,))))
        moved = transformed(alone, random_moves(alone, rng), tensors)
        after = _outputs(landscape, torch.cat([t.reshape(-1) for t in moved.values()]))
        pairs = zip(before, after, strict=True)
        return all((a - b).abs().max() <= rounding * a.abs().max() for a, b in pairs)

    kept, left_out = [], list(known.left_out)
    for part in known.parts.values():
        names = {p.name for p in part.places} | {n.weight for n in getattr(part, "norms", ())}
        if missing := sorted(names - tensors.keys()):
            left_out.append(f"{part.name} are left as they are: {missing[0]} is frozen")
        elif chosen := next(filter(keeps, _attempts(part)), None):
            kept.append(chosen)
        else:
            left_out.append(f"{part.name} are left as they are: a change of them is no symmetry")
    return Symmetries(
        tuple(p for p in kept if isinstance(p, Space)),
        tuple(p for p in kept if isinstance(p, Heads)),
        tuple(dict.fromkeys(left_out)),
    )


def _generic(landscape: Landscape, theta: Tensor, rng: torch.Generator) -> Tensor:
    """θ moved a little: with gains of 1 and biases of 0 a move that forgets one would pass."""
    parts = []
    for tensor in landscape.unflatten(theta).values():
        size = tensor.square().mean().sqrt() or 1
        noise = torch.randn(tensor.numel(), generator=rng, dtype=theta.dtype).to(theta.device)
        parts.append(tensor.reshape(-1) + NOISE * size * noise)
    return torch.cat(parts)


def _attempts(part: Space | Heads) -> list[Space | Heads]:
    """The part with all of its freedom, then with less."""
    if isinstance(part, Space):
        return [replace(part, freedom=f) for f in FREEDOMS[FREEDOMS.index(part.freedom) :]]
    values = replace(part, mixes_scores=False)
    return [part, values, replace(values, mixes_values=False)]


def _outputs(landscape: Landscape, theta: Tensor) -> list[Tensor]:
    """Losses and outputs of a few samples."""
    part = landscape.data.few(landscape.network, FEW)
    with torch.no_grad(), landscape.network.at(theta):
        losses, outputs = part.both(theta)
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return [losses, *tensors]

"""The symmetries of a network, recognised from one forward pass and then tried.

No module is known by its name or class: `Dataflow` sees which parameter reads what which other has
written, and `head_rows` what of a projection belongs to which head. Every symmetry is then tried
with a random move in float64; what changes the outputs is none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lsa.landscape.dataflow import Axis, Dataflow, classes
from lsa.landscape.head_rows import UnknownError, heads_of
from lsa.landscape.landscape import Landscape
from lsa.maths.alignment.random_moves import random_moves
from lsa.maths.alignment.symmetries import (
    FREEDOMS,
    Heads,
    Norm,
    Space,
    Symmetries,
    TensorAxis,
    transformed,
)
from lsa.runtime.errors import InputError, first_line

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
    tried = _tried(double, theta, declared, _rounding(flow))
    if not tried.parts:
        raise InputError(
            "no symmetry of this network was recognised"
            + "".join(f"; {line}" for line in tried.left_out)
        )
    return tried


def rounding(landscape: Landscape, theta: Tensor) -> float:
    """Relative change of an output at θ `(d,)` that is none, for a landscape in float64."""
    try:
        return _rounding(recorded(landscape, theta))
    except InputError:  # it cannot be recorded
        return ROUNDING


def _rounding(flow: Dataflow) -> float:
    return SINGLE if flow.single_precision else ROUNDING


def recorded(landscape: Landscape, theta: Tensor) -> Dataflow:
    """One forward pass at θ `(d,)`, recorded with its graph.

    Raises:
        InputError: The network fails while its operations are recorded.
    """
    theta = theta.detach().requires_grad_()
    shapes = {name: tuple(t.shape) for name, t in landscape.unflatten(theta).items()}
    flow = Dataflow(landscape.model, theta, shapes)
    part = landscape.data.few(landscape.network, FEW)
    try:
        with landscape.network.at(theta), torch.enable_grad(), flow:
            part.both(theta)
    except Exception as error:
        raise InputError(f"the forward pass cannot be recorded ({first_line(error)})") from error
    return flow


def recognised(flow: Dataflow) -> Symmetries:
    """Symmetries read from a forward pass and not yet tried, each with its largest freedom."""
    heads, left_out = [], []
    for attention in flow.attentions:
        try:
            heads.append(heads_of(flow, attention))
        except UnknownError as error:
            left_out.append(f"heads are left as they are: {error}")
    inside = {(p.name, p.dim) for h in heads for p in h.axes}
    spaces = [_space(flow, axes) for axes in classes(flow.joined)]
    apart = [s for s in spaces if s and not inside & {(p.name, p.dim) for p in s.axes}]
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
    members = [
        TensorAxis(
            name,
            dim,
            None if size == n else torch.arange(n) + part * n,
            reads=(name, dim) in flow.reads,
        )
        for (name, dim), size in sizes.items()
        if name not in gains
        for part in range(size // n)
    ]
    folding = tuple(
        Norm(
            norm.weight,
            norm.bias,
            tuple(TensorAxis(name, dim) for name, dim in dict.fromkeys(norm.readers)),
            norm.alone and all(flow.uses[name] == 1 for name, _ in norm.readers),
        )
        for norm in {norm.weight: norm for norm in norms}.values()
    )
    twice = Counter(norm.weight for norm in norms)
    folding = tuple(replace(f, folds=f.folds and twice[f.weight] == 1) for f in folding)
    magnitudes = tuple(TensorAxis(name, 0) for name in gains)
    made = [name for name in flow.shapes for axis in sizes if axis[0] == name and axis in flow.made]
    first = next(name for name in flow.shapes if any(axis[0] == name for axis in sizes))
    name = f"stream of {first}" if norms else f"units of {made[0] if made else first}"
    rotates = all(norm.folds for norm in folding)
    freedom = "orthogonal" if rotates else "signed"
    return Space(name, n, tuple(members), magnitudes, folding, freedom)


# --- trial ----------------------------------------------------------------------------------------


def _tried(landscape: Landscape, theta: Tensor, known: Symmetries, rounding: float) -> Symmetries:
    """The symmetries that keep the function, each with the largest freedom that does."""
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
        names = {p.name for p in part.axes} | {n.weight for n in getattr(part, "norms", ())}
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

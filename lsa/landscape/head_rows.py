"""Which rows of a projection belong to which head of attention, and which turn together.

Read from derivatives of queries, keys and values by what the projection gives: at the first place a
rotary embedding is the identity, so that each coordinate of a head is one row; at the second it
mixes those that it turns together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsa.landscape.dataflow import Attended, Axis, Dataflow
from lsa.maths.alignment.symmetries import Heads, TensorAxis


class UnknownError(Exception):
    """An attention is not made as is known here."""


def heads_of(flow: Dataflow, attention: Attended) -> Heads:
    """Heads of one attention, by the rows of the layers that make queries, keys and values.

    Raises:
        UnknownError: The attention, or a layer that makes or reads it, has a form that is not
            recognised.
    """
    q, k, v = attention.query, attention.key, attention.value
    if any(t.ndim != 4 for t in (q, k, v)) or q.shape[2] < 2:
        raise UnknownError("attention is not of shape (batch, heads, positions, width)")
    axes = [axis for t in (q, k, v) if (axis := flow.single(t))]
    if len(axes) < 3 or len(attention.readers) != 1:
        raise UnknownError("more than one layer makes or reads one part of attention")
    rows, plain = [], True
    for axis, t in zip(axes, (q, k, v), strict=True):
        row, same = _rows(flow.made[axis], t)
        rows.append(row)
        plain &= same or t is v
        if t is v and not same:
            raise UnknownError("values are changed on their way to attention")
    groups = _groups(rows[1])
    r, rest = divmod(q.shape[1], len(groups))
    if rest or any(len(members) * len(k[0]) != len(members) * k.shape[1] for members in groups):
        raise UnknownError("keys are shared by numbers of heads that differ")
    first = [members[0] for members in groups]
    if k.shape[1] == q.shape[1]:
        members = torch.tensor(groups)
    else:  # attention itself repeats keys for the queries of a group
        members = torch.arange(q.shape[1]).reshape(len(groups), r)
    out_axis, given = attention.readers[0]
    columns = _columns(attention.result, given)
    indices = rows[0][members], rows[1][first], rows[2][first]
    query, key, value = (
        _axes(flow, axis, index) for axis, index in zip(axes, indices, strict=True)
    )
    return Heads(
        f"heads of {out_axis[0]}",
        query,
        key,
        value,
        (TensorAxis(*out_axis, columns[members]),),
        _pairs(flow.made[axes[0]], q, rows[0][0]) if plain else torch.empty(0, 2).long(),
        mixes_scores=plain,
    )


def _axes(flow: Dataflow, axis: Axis, index: Tensor) -> tuple[TensorAxis, ...]:
    bias = flow.biases.get(axis)
    own = TensorAxis(axis[0], axis[1], index)
    return (own, TensorAxis(bias, 0, index)) if bias else (own,)


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
            raise UnknownError("a head does not have rows of its projection for itself")
        order = derivative[at].argsort()
        same = torch.equal(derivative[at][order], codes)
        rows.append(at[order] if same else at)
        plain &= same
    return torch.stack(rows).cpu(), plain


def _derivative(value: Tensor, by: Tensor) -> Tensor:
    """By the last axis, summed over the others."""
    (derivative,) = torch.autograd.grad(value, by, retain_graph=True, allow_unused=True)
    if derivative is None:
        raise UnknownError("attention does not depend on its projection")
    return derivative.reshape(-1, by.shape[-1]).sum(0)


def _columns(result: Tensor, given: Tensor) -> Tensor:
    """Column of the output layer that reads each coordinate of each head, `(H, n)`."""
    codes = torch.arange(1.0, given.shape[-1] + 1, dtype=given.dtype, device=given.device)
    first = given.reshape(-1, given.shape[-1])[0]
    (derivative,) = torch.autograd.grad((first * codes).sum(), result, retain_graph=True)
    columns = derivative[0, :, 0].round().long() - 1
    if not torch.equal(columns.flatten().sort().values.cpu(), torch.arange(columns.numel())):
        raise UnknownError("outputs of heads are changed before the output layer")
    return columns.cpu()


def _pairs(made: Tensor, query: Tensor, rows: Tensor) -> Tensor:
    """Coordinates of a head that its position turns together, `(p, 2)`."""
    pairs = set[tuple[int, ...]]()
    for j in range(query.shape[-1]):
        derivative = _derivative(query[0, 0, 1, j], made).cpu()
        mixed = derivative[rows].abs() > 1e-14
        mixed[j] = True
        if mixed.sum() > 2:
            raise UnknownError("the position mixes more than two coordinates of a head")
        if mixed.sum() == 2:
            pairs.add(tuple(mixed.nonzero().flatten().tolist()))
    coordinates = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)
    if len(coordinates.unique()) != coordinates.numel():
        raise UnknownError("the position mixes more than two coordinates of a head")
    return coordinates

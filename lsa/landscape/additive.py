"""Whether the terms of a batch add up as an objective says: by its samples, and by its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lsa.landscape.batched import Batched
from lsa.landscape.network import HALF, Converts
from lsa.landscape.terms import Terms, unit_sums, unit_weights
from lsa.landscape.weighing import rows
from lsa.runtime.errors import InputError

if TYPE_CHECKING:
    from lsa.landscape.landscape import Landscape

ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}  # of sums, relative; else 5e-2
CUT = (
    "the loss of a batch is not the sum over its parts, as with class weights, ignored labels or "
    "samples that a batch couples: L is the mean over these batches and depends on how they are cut"
)
MIXED = (
    "the loss of a sample depends on the others of its batch, as with batch statistics: L depends "
    "on how the data are cut into batches, and errors over the data take samples for independent"
)


def notes(landscape: Landscape, theta: Tensor, drawn: bool) -> tuple[str, ...]:
    """Notes on numbers from batches, from checks of the first batch.

    Args:
        landscape: On batches; a landscape on tensors gives no notes.
        theta: θ `(d,)`.
        drawn: Whether the network draws random numbers. The checks compare a batch with its parts,
            which would draw others, so they are skipped then.

    Raises:
        InputError: `Terms.total` has another gradient than the samples that it is the sum of, or
            is a mean.
    """
    data = landscape.data
    if not isinstance(data, Batched):
        return ()
    remarks = data.batches.remarks()
    if landscape.has_samples and not drawn:
        _check_gradients(landscape, theta)
    if not drawn and _mixed(landscape, data, theta):
        remarks = (*remarks, MIXED)
    whole = not drawn and not data.draws  # else the parts would draw other numbers
    if whole and not landscape.has_samples and _cut_matters(landscape, data, theta):
        remarks = (*remarks, CUT)
    return remarks


def _check_gradients(landscape: Landscape, theta: Tensor) -> None:
    """Check that total and samples have the same gradient; every pass compares their values."""
    try:
        at = theta.detach().double()
        fine, t = landscape.double(at), at.requires_grad_()
        part = next(iter(fine.data.parts(fine.network)))
        with torch.enable_grad(), fine.network.at(t):
            value, losses = part.loss(t), part.losses(t).sum()
            total = _slope(value, t).mul_(losses.item())
            summed = _slope(losses, t).mul_(value.item())
    except (RuntimeError, TypeError, Converts):  # an operation has no float64
        return
    scale = max(total.norm(), summed.norm())
    if total.sub_(summed).norm() > 1e-3 * scale + 1e-9 * abs(value.item()):
        raise InputError(
            "the gradient of Terms.total is not that of the samples that it is the sum of; compute "
            "one from the other: Terms(samples.sum(), weight, samples)"
        )


def _slope(value: Tensor, t: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value, t, retain_graph=True, materialize_grads=True)[0]


def _mixed(landscape: Landscape, data: Batched, theta: Tensor) -> bool:
    """Whether samples of the first batch have other losses without the other half of it.

    Raises:
        InputError: Parts of the batch say that the total is a mean, and the weight its samples.
    """
    batch = next(iter(data.batches))
    tensors = [t for t in tree_leaves(batch.content) if isinstance(t, Tensor)]
    n = len(tensors[0]) if tensors and tensors[0].ndim else 0
    if n < 2 or not all(t.layout == torch.strided and not t.is_nested for t in tensors):
        return False
    if not all(t.ndim and len(t) == n for t in tensors):  # not all of it belongs to samples
        return False
    half = n // 2
    halves: list[slice | Tensor] = [slice(0, half), slice(half, n)]
    if data.draws:  # a part would draw other numbers: each half is beside other samples instead
        first, last = torch.arange(n), torch.arange(n)
        first[half:], last[:half] = 0, n - 1
        halves = [first, last]
    try:
        full, *parts = (
            _terms(landscape, data, theta, batch.content, n, at) for at in (slice(0, n), *halves)
        )
    except (RuntimeError, ValueError, IndexError, InputError):
        return False
    digits = ROUNDING.get(full.total.dtype, 5e-2)
    digits = 5e-2 if any(p.dtype in HALF for p in landscape.model.parameters()) else digits
    if full.samples is None:
        if not data.draws:
            _check_sum(full, parts, n, digits)
        return False
    sums = [unit_sums(terms) for terms in parts]
    apart = torch.cat([sums[0][:half], sums[1][half:]] if data.draws else sums)
    together = unit_sums(full)
    if apart.shape != together.shape or not bool(together.isfinite().all()):
        return False
    return float((apart - together).abs().max()) > digits * float(together.abs().max())


def _cut_matters(landscape: Landscape, data: Batched, theta: Tensor) -> bool:
    """Whether the first batch, or half of it beside half of the last, is no sum over its halves.

    In sorted data the samples of one batch weigh alike, those of the first and the last do not.
    """
    first = last = None
    for batch in data.batches:
        first, last = batch.content if first is None else first, batch.content
    sizes = [_length(content) for content in (first, last)]
    if min(sizes) < 2:
        return False
    n = sizes[0] // 2
    try:
        head, tail = rows(first, slice(0, n), sizes[0]), rows(last, slice(-n, None), sizes[1])
        both = tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, head, tail)
        checked = (first, sizes[0]), (both, _length(both))
        sums = [[_terms(landscape, data, theta, c, m, at) for at in _halves(m)] for c, m in checked]
    except (RuntimeError, ValueError, IndexError, InputError):
        return False

    def apart(full: Terms, *parts: Terms) -> bool:
        own, added = float(full.total), sum(float(t.total) for t in parts)
        digits = ROUNDING.get(full.total.dtype, 5e-2)
        return abs(own - added) > digits * max(abs(own), abs(added))

    return any(apart(*terms) for terms in sums)


def _halves(n: int) -> tuple[slice, slice, slice]:
    return slice(0, n), slice(0, n // 2), slice(n // 2, n)


def _length(content: Any) -> int:
    """Number of samples of a batch whose tensors all have them first; else 0."""
    tensors = [t for t in tree_leaves(content) if isinstance(t, Tensor)]
    plain = all(t.layout == torch.strided and not t.is_nested and t.ndim for t in tensors)
    lengths = {len(t) for t in tensors} if plain else set()
    return lengths.pop() if len(lengths) == 1 else 0


@torch.no_grad()
def _terms(
    landscape: Landscape, data: Batched, theta: Tensor, content: Any, n: int, at: slice | Tensor
) -> Terms:
    with landscape.network.at(theta):
        return data.terms(landscape.network, rows(content, at, n))


def _check_sum(batch: Terms, parts: list[Terms], n: int, digits: float) -> None:
    """Check that the total is a sum over the units, and not their mean."""
    weight, *shares = (float(unit_weights(t)) for t in (batch, *parts))
    total, *sums = (float(t.total) for t in (batch, *parts))
    mean = sum(s * w for s, w in zip(sums, shares, strict=True)) / weight
    counts = weight > 1 and abs(sum(shares) - weight) <= 1e-6 * weight

    def close(a: float) -> bool:
        return abs(a - total) <= digits * abs(total)

    if counts and total and close(mean) and not close(sum(sums)):
        raise InputError(
            f"Terms.total is {total:.6g} for {n} samples and about as much for half of them, so it "
            f"is a mean, but Terms.weight is {weight:g}; give the sum: total = mean * weight"
        )

"""How a loss `(outputs, targets) → scalar` weighs the samples of a batch.

torch's cross entropies are asked: their mean runs over class weights and over targets that are not
ignored. Any other loss must be a plain mean over samples, and a few samples show whether it is.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lsa.runtime.errors import InputError, first_line

Loss = Callable[[Any, Any], Tensor]
TRIED = 8  # samples at most on which a loss is tried
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}  # of a loss, relative; else 1e-2
REMEDY = (
    "give Landscape(model, batches, objective=…), whose objective returns the sum and its weight "
    "(lsa.Terms; lsa.objectives has weighted, per_token and others)"
)


@dataclass(frozen=True)
class Weighing:
    """L of a batch is Σ sums / Σ weights; without weights each sample counts 1."""

    sums: Callable[[Any, Any], Tensor]  # (outputs, targets) → `(n,)`
    weights: Callable[[Any], Tensor | None]  # targets → `(n,)`


def given(loss: Loss, outputs: Any) -> Any:
    """What a loss is given of a network's outputs: one of torch's gets a Hugging Face's logits."""
    inner = loss.func if isinstance(loss, functools.partial) else loss
    module = getattr(inner, "__module__", None) or ""
    return outputs.logits if module.startswith("torch.") and hasattr(outputs, "logits") else outputs


def separate(outputs: Any) -> Any:
    """Outputs none of which is made from another, where a network returns several.

    A code and what is decoded from it lie on one way: the loss's derivative by the code alone, as
    the Gauss–Newton part needs it, is that by a view of it.

    Args:
        outputs: Of the network, a pytree.
    """
    leaves, form = tree_flatten(outputs)
    if sum(isinstance(leaf, Tensor) for leaf in leaves) < 2:
        return outputs

    def own(leaf: Any) -> Any:
        viewed = isinstance(leaf, Tensor) and leaf.requires_grad
        viewed = viewed and leaf.layout == torch.strided and not leaf.is_nested
        return leaf.view_as(leaf) if viewed else leaf

    return tree_unflatten([own(leaf) for leaf in leaves], form)


def rows(tree: Any, which: Any, n: int, several: list[bool] | None = None) -> Any:
    """Some of the samples of a pytree.

    Args:
        tree: Tensors `(n, …)`, and values that all samples share, which are kept.
        which: Indices or a slice.
        n: Number of samples.
        several: Of each leaf, whether it has a row for each sample; default: by its length.
    """
    leaves, form = tree_flatten(tree)
    several = [_has(leaf, n) for leaf in leaves] if several is None else several
    parts = [leaf[which] if s else leaf for leaf, s in zip(leaves, several, strict=True)]
    return tree_unflatten(parts, form)


def of_samples(outputs: Any, y: Any, fewer: Callable[[], Any]) -> list[bool]:
    """Of each leaf of outputs and targets, whether it has a row for each sample.

    What all samples share, such as prototypes, may be as long by chance.

    Args:
        outputs: Of the network, a pytree.
        y: Targets, a pytree of `(n, …)`.
        fewer: Gives the outputs without the last sample; asked where there is a doubt.
    """
    n = len(tree_leaves(y)[0])
    long = [_has(leaf, n) for leaf in tree_leaves(outputs)]
    if n > 1 and sum(long) > 1:
        try:
            less = tree_leaves(fewer())
            long = [a and _has(b, n - 1) for a, b in zip(long, less, strict=True)]
        except (RuntimeError, ValueError, IndexError, TypeError):  # a batch that cannot be cut
            pass
    return long + [_has(leaf, n) for leaf in tree_leaves(y)]


def _has(leaf: Any, n: int) -> bool:
    """Whether a leaf of a pytree has n samples along its first dimension."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == n


def weighing(loss: Loss) -> Weighing | None:
    """The weighing of a loss of torch; None for a loss that must be tried.

    Raises:
        InputError: Its `reduction` is no mean.
    """
    if isinstance(loss, nn.Module) or isinstance(loss, functools.partial):
        options = loss.keywords if isinstance(loss, functools.partial) else vars(loss)
        reduction = options.get("reduction", "mean")
        if reduction not in ("mean", "batchmean"):
            raise InputError(
                f"the loss has reduction={reduction!r} and is no mean over samples; "
                f"take reduction='mean', or {REMEDY}"
            )
    options = _cross_entropy(loss)
    return None if options is None else _of_classes(*options)


def _cross_entropy(loss: Loss) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """The functional form and options of a cross entropy; None of another loss."""
    if loss in (F.cross_entropy, F.nll_loss):
        return loss, {}
    if isinstance(loss, functools.partial) and loss.func in (F.cross_entropy, F.nll_loss):
        return (loss.func, dict(loss.keywords)) if not loss.args else None
    for kind, function in ((nn.CrossEntropyLoss, F.cross_entropy), (nn.NLLLoss, F.nll_loss)):
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            names = ("weight", "ignore_index", "label_smoothing")
            options = {n: getattr(loss, n) for n in names if getattr(loss, n, None) is not None}
            return function, options
    return None


def _of_classes(function: Callable[..., Tensor], options: dict[str, Any]) -> Weighing:
    ignored = options.get("ignore_index", -100)
    by_class: Tensor | None = options.get("weight")
    rest = {k: v for k, v in options.items() if k not in ("weight", "reduction")}

    def sums(outputs: Tensor, y: Tensor) -> Tensor:
        given = rest if by_class is None else {**rest, "weight": by_class.to(outputs)}
        try:
            each = function(outputs, y, reduction="none", **given)
        except (RuntimeError, IndexError) as error:
            raise InputError(_refusal(outputs, y, ignored, error)) from error
        if y.is_floating_point():  # probabilities: the mean runs over all positions
            return each.reshape(len(y), -1).mean(1)
        return each if each.ndim == 1 else each.reshape(len(y), -1).sum(1)

    def weights(y: Tensor) -> Tensor | None:
        if y.is_floating_point():
            return None
        counted = y != ignored
        if by_class is None:
            if y.ndim == 1 and bool(counted.all()):
                return None
            return counted.reshape(len(y), -1).sum(1).double()
        each = by_class.to(y.device).double()[y.clamp(min=0)] * counted
        return each.reshape(len(y), -1).sum(1)

    return Weighing(sums, weights)


def _refusal(outputs: Tensor, y: Tensor, ignored: int, error: Exception) -> str:
    """A line that says why a cross entropy refuses its targets."""
    classes = outputs.shape[1] if outputs.ndim > 1 else 1
    labels = not y.is_floating_point() or y.shape != outputs.shape
    if labels and y.dtype not in (torch.int64, torch.uint8):
        return f"targets are {y.dtype}; a cross entropy takes labels of torch.int64: give y.long()"
    wrong = y[((y < 0) | (y >= classes)) & (y != ignored)]
    if labels and len(wrong):
        return (
            f"target {wrong[0].item()} is out of range; the network has {classes} outputs per "
            f"sample, so labels are 0 to {classes - 1}"
        )
    shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(y.shape)}"
    return f"the cross entropy refuses {shapes}: {first_line(error)}"


# --- other losses, by trying ----------------------------------------------------------------------


def mean_over_samples(loss: Loss, outputs: Any, y: Any, several: list[bool]) -> Weighing:
    """The weighing of a loss that is a mean over samples, tried on some that differ.

    Args:
        loss: Of the whole batch.
        outputs: Of the network for these samples, a pytree of `(n, …)`.
        y: Their targets.
        several: From `of_samples`.

    Raises:
        InputError: Samples alone, or two halves, have another mean than all together; the loss
            depends on trainable tensors beside the outputs; or it gives no single number.
    """
    outputs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, outputs)
    n = len(tree_leaves(y)[0])
    alone = Weighing(functools.partial(_one_by_one, loss, several), lambda _: None)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that do not fit, which are refused below
        try:
            together, again = loss(outputs, y), loss(outputs, y)
        except (RuntimeError, ValueError, IndexError) as error:
            line = first_line(error)
            raise InputError(f"the loss of {n} sample(s) fails: {line}; {REMEDY}") from error
    if not isinstance(together, Tensor) or together.numel() != 1:
        shape = tuple(together.shape) if isinstance(together, Tensor) else type(together).__name__
        raise InputError(
            f"the loss of a batch is {shape} and no single number; return its mean, or {REMEDY}"
        )
    if reach_outside(leaves(together), leaves(again)):
        raise InputError(
            "the loss depends on trainable tensors beside the network's outputs, as a penalty that "
            f"closes over the model does; its gradient would be left out: {REMEDY}"
        )
    if n == 1:  # alone it shows no weighing; it is its own mean
        return alone
    cuts = {"each alone": range(1, n), "two parts": [max(1, n // 3)]}
    for name, cut in cuts.items():
        mean = _mean(loss, (outputs, y), [0, *cut, n], several)
        if not _agree(together.item(), mean, together.dtype):
            raise InputError(
                f"the loss of {n} samples together is {together.item():.6g}, the mean of {name} "
                f"{mean:.6g}: the loss is no mean over samples; {REMEDY}"
            )
    return alone


def reach_outside(first: dict[int, Tensor], second: dict[int, Tensor]) -> bool:
    """Whether two evaluations depend on the same trainable tensor outside θ, by their `leaves`.

    A leaf that an evaluation makes for itself, as a physics-informed loss does of its inputs, is
    another tensor each time and does not count.

    Args:
        first: Leaves of one evaluation at a detached θ, tensors of any shape by identity.
        second: Leaves of another.
    """
    return bool(first.keys() & second.keys())


def leaves(value: Tensor) -> dict[int, Tensor]:
    """The tensors by which a scalar can be differentiated, by identity; its graph is not kept."""
    if value.grad_fn is None:
        return {id(value): value} if value.requires_grad else {}
    seen, waiting, known = set(), [value.grad_fn], {}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            known[id(leaf)] = leaf
        waiting += [following for following, _ in node.next_functions if following is not None]
    return known


def _mean(loss: Loss, both: Any, ends: list[int], several: list[bool]) -> float:
    """Mean over samples of the losses of the parts between the ends."""
    total, n = 0.0, ends[-1]
    for start, end in itertools.pairwise(ends):
        part = slice(start, end)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = loss(*rows(both, part, n, several))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            line = first_line(error)
            raise InputError(
                f"the loss of {end - start} sample(s) fails: {line}; {REMEDY}"
            ) from None
        total += value.item() * (end - start)
    return total / n


def _agree(a: float, b: float, dtype: torch.dtype) -> bool:
    """Whether two losses differ by rounding alone; nan with nan, since probes will say so."""
    if math.isnan(a) and math.isnan(b):
        return True
    return a == b or abs(a - b) <= ROUNDING.get(dtype, 1e-2) * max(abs(a), abs(b))


def _one_by_one(loss: Loss, several: list[bool], outputs: Any, y: Any) -> Tensor:
    """ℓᵢ `(n,)` of a mean over samples; `several` says which leaves have one row for each."""

    leaves, form = tree_flatten((outputs, y))

    def alone(*sample: Tensor) -> Tensor:
        parts = iter(sample)
        filled = [
            next(parts).unsqueeze(0) if s else leaf for leaf, s in zip(leaves, several, strict=True)
        ]
        return loss(*tree_unflatten(filled, form)).reshape(())

    parted = [leaf for leaf, s in zip(leaves, several, strict=True) if s]
    try:
        return vmap(alone)(*parted)
    except RuntimeError:  # an operation that vmap does not know
        return torch.stack([alone(*sample) for sample in zip(*parted, strict=True)])


def joined(before: list[Any], batch: list[Any], several: list[bool]) -> list[Any]:
    """Outputs and targets of samples that differ most, of those before and of a batch.

    Args:
        before: Of the batches before; empty for the first.
        batch: Outputs and targets.
        several: From `of_samples`.
    """
    chosen = _most_different(batch, several)
    if not before:
        return chosen
    leaves, form = tree_flatten(chosen)
    try:
        both = [
            torch.cat([old, new]) if s else new
            for old, new, s in zip(tree_leaves(before), leaves, several, strict=True)
        ]
        return _most_different(tree_unflatten(both, form), several)
    except (RuntimeError, ValueError):  # of other shapes
        return chosen


def _most_different(batch: list[Any], several: list[bool]) -> list[Any]:
    n = len(tree_leaves(batch[1])[0])
    return rows(batch, differing(batch[1]).to(tree_leaves(batch[0])[0].device), n, several)


def differing(y: Any, most: int = TRIED) -> Tensor:
    """Indices of samples whose targets differ as much as any: by label, length, size, position.

    Of every sample the first, the last, and those that have the least and the most of: their sum,
    their smallest and largest number, and how often the data's smallest number (a label that is
    ignored) and zero (padding) occur.
    """
    n = len(tree_leaves(y)[0])
    chosen = [0, n - 1]
    for leaf in tree_leaves(y):
        if not isinstance(leaf, Tensor) or len(leaf) != n or leaf.numel() == 0:
            continue
        rows = leaf.detach().reshape(n, -1)
        rows = (rows.abs() if rows.is_complex() else rows).double()  # flags have no smallest index
        features = [rows.sum(1), rows.amin(1), rows.amax(1)]
        features += [(rows == rows.min()).sum(1), (rows == 0).sum(1)]
        for feature in features:
            chosen += [int(feature.argmin()), int(feature.argmax())]
    chosen += [n * i // most for i in range(most)]
    return torch.tensor(list(dict.fromkeys(chosen))[:most])

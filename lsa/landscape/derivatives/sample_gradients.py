"""Per-sample gradients gᵢ = ∇ℓᵢ(θ), layer by layer, from one backward pass.

Calls of layers are recorded on the way forward; the backward pass, which computes no gradient of
a weight, brings the gradients at their outputs. What is made of both is in
`lsa.landscape.derivatives.layer_gradients`. A second backward pass, in which each loss has a
weight, shows that row i of each layer belongs to sample i: a network may reorder its samples, as
one of experts does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lsa.landscape.derivatives.convolution import convolution_geometry
from lsa.landscape.derivatives.layer_gradients import (
    Convolution,
    Factors,
    Layer,
    Linear,
    Rows,
    SampleGradients,
)
from lsa.landscape.derivatives.modes import gradient

Losses = Callable[[Tensor], Tensor]  # θ `(d,)` ↦ ℓᵢ(θ) `(n,)`
AGREEMENT = 1e-3  # relative, between gradients that differ by rounding alone
SAME_SAMPLES = (
    1e-2  # relative, above which a number has not the weight of its sample; half precision
)


def of(losses: Losses, theta: Tensor, *, check: bool = True) -> SampleGradients | None:
    """The gradients at θ of losses of independent samples, one pass forward and two back.

    Args:
        losses: θ `(d,)` ↦ ℓᵢ(θ) `(n,)`.
        theta: θ.
        check: False: the same losses were given before, and need no second backward pass.

    Returns:
        The gradients `(n, d)` in the layers' own form. None where a parameter enters otherwise
        than as weight or bias of a layer of `LAYERS`, or where a layer's inputs do not have the
        samples along their first dimension, in the order of the losses.
    """
    at = theta.detach().clone()
    with torch.enable_grad(), _Recording(at) as recording:
        values = losses(at)
        total = values.sum()
    calls, n = recording.calls, len(values)
    if recording.refused or not total.requires_grad:
        return None
    for call in calls:  # a network may take derivatives in its forward pass
        call.delta, call.lengths = None, ()
    torch.autograd.grad(total, recording.token, allow_unused=True, retain_graph=check)
    if any(c.outputs != n or len(c.a) != n or c.a._version != c.version for c in calls):
        return None
    if check:
        weights = drawn_weights(values)
        torch.autograd.grad(values, recording.token, weights, allow_unused=True)
        if not all(call.has_rows_of_samples(weights) for call in calls):
            return None
    layers = [
        layer(span, call.delta)
        for call in calls
        if call.delta is not None
        for span, layer in call.parameters
    ]
    return SampleGradients(n, len(theta), layers) if layers else None


def drawn_weights(losses: Tensor) -> Tensor:
    """A weight from 1 to 2 for each of some losses `(n,)`, always the same."""
    drawn = 1 + torch.rand(len(losses), generator=torch.Generator().manual_seed(0))
    return drawn.to(losses)


def one_by_one(losses: Losses, theta: Tensor) -> SampleGradients:
    """The gradients `(n, d)` at θ `(d,)` of any losses, by n backward passes through one graph."""
    (rows,) = rows_one_by_one(losses, theta, 1 << 62)
    return SampleGradients(len(rows), len(theta), [Rows(slice(0, len(theta)), rows)])


def rows_one_by_one(losses: Losses, theta: Tensor, size: int) -> Iterator[Tensor]:
    """Like `one_by_one`, in blocks of at most `size` rows `(n, d)`."""
    t = theta.detach().requires_grad_()
    with torch.enable_grad():
        values = losses(t)
    for some in values.split(min(size, len(values))):
        yield torch.stack([gradient(value, t, retain_graph=True) for value in some])


def are_exact(losses: Losses, theta: Tensor) -> bool:
    """Whether `of` gives the gradients of losses at θ `(d,)`: an unequal sum is autograd's.

    A dimension that by chance is as long as there are samples could be taken for theirs, and a
    network that checks how its operations are called (checkpointing does) may refuse.
    """
    try:
        gradients = of(losses, theta)
    except (RuntimeError, TypeError, IndexError):
        return False
    if gradients is None:
        return False
    t = theta.detach().requires_grad_()
    with torch.enable_grad():
        values = losses(t)
        weights = drawn_weights(values)
        (wanted,) = torch.autograd.grad(values @ weights, t)
    return bool((gradients.pull(weights.to(wanted)) - wanted).norm() <= AGREEMENT * wanted.norm())


# --- what a pass records -------------------------------------------------------------------------

Parameter = tuple[
    Tensor, Callable[[slice, Tensor], Layer]
]  # it, and (its span in θ, δ) ↦ its layer


@dataclass
class _Call:
    """One call of a layer."""

    a: Tensor
    version: int  # of a when it was used
    outputs: int  # along the first dimension
    parameters: list[tuple[slice, Callable[[slice, Tensor], Layer]]]
    delta: Tensor | None = None  # None as long as no loss is seen to depend on the outputs
    lengths: tuple[Tensor, ...] = ()  # of the rows of δ, of each backward pass

    def keep(self, delta: Tensor) -> None:
        """Take the δ of a backward pass, and of a second one no more than its lengths."""
        if self.delta is None:
            self.delta = delta.detach()
        self.lengths += (torch.linalg.vector_norm(delta, dim=(*range(1, delta.ndim),)),)

    def has_rows_of_samples(self, weights: Tensor) -> bool:
        """Whether row i of δ is of loss i alone, whose weight the second backward pass had."""
        if self.delta is None:
            return True
        if len(self.lengths) != 2:
            return False
        before, after = self.lengths
        wanted = before * weights.to(before)
        return bool(((after - wanted).abs() <= SAME_SAMPLES * wanted).all())


class _Recording(TorchFunctionMode):
    """Within the block, calls of layers whose parameters are views of θ are recorded."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self._theta = theta
        self.token = theta.new_zeros(()).requires_grad_()  # by it the backward pass gets everywhere
        self.calls: list[_Call] = []
        self.refused = False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The operation itself, and a note of it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        used = any(self._of_theta(t) for t in _tensors((args, kwargs)))
        if not used or all(self._of_theta(t) for t in _tensors(out)):  # a view, a size
            return out
        a, parameters = LAYERS[func](func, *args, **kwargs) if func in LAYERS else (out, [])
        own = [(p, layer) for p, layer in parameters if self._of_theta(p)]
        self.refused |= (
            not own
            or a.is_nested
            or self._of_theta(a)
            or not all(p.is_contiguous() for p, _ in own)
        )
        if self.refused:
            return out
        spans = [
            (slice(p.storage_offset(), p.storage_offset() + p.numel()), layer) for p, layer in own
        ]
        self.calls.append(call := _Call(a.detach(), a._version, len(out), spans))
        return _Tap.apply(out, self.token, call.keep)

    def _of_theta(self, t: Tensor | None) -> bool:
        return t is not None and (t is self._theta or t._base is self._theta)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Tap(Function):
    """The identity, whose backward pass gives away what comes by."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        ctx.keep = keep
        ctx.mark_dirty(y)  # not a view, so that what follows may work in place
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        ctx.keep(*gradients)
        return *gradients, None, None


def _convolved(
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, list[Parameter]]:
    if isinstance(padding, str) or input.ndim != weight.ndim:
        return input, []
    geometry = convolution_geometry(func, stride, padding, dilation, groups)
    return input, [
        _product(weight, input, Convolution(weight.shape, geometry)),
        *_few(bias, lambda delta: delta.flatten(2).sum(2)),
    ]


def _mapped(
    func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, list[Parameter]]:
    if input.ndim < 2:
        return input, []
    return input, [
        _product(weight, input, Linear(weight.shape)),
        *_few(bias, lambda delta: delta.reshape(len(delta), -1, delta.shape[-1]).sum(1)),
    ]


def _normed_by_batch(
    func: Callable,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,  # as torch hands these over
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, list[Parameter]]:
    if training or input.ndim < 2:
        return input, []
    fixed = running_mean, running_var
    return _scaled(input, weight, bias, lambda x: func(x, *fixed, None, None, False, 0.0, eps))


def _normed_by_group(
    func: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, list[Parameter]]:
    return _scaled(input, weight, bias, lambda x: func(x, num_groups, None, None, eps))


def _scaled(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Parameter]]:
    """y = w x̂ + b with one number of each per channel."""

    def summed(images: Tensor) -> Tensor:
        return images.reshape(*images.shape[:2], -1).sum(2)

    return input, [
        *_few(weight, lambda delta: summed(delta * normed(input.detach()))),
        *_few(bias, summed),
    ]


def _normed_by_layer(
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, list[Parameter]]:
    sizes = list(normalized_shape)
    if input.ndim == len(sizes):
        return input, []

    def summed(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1, math.prod(sizes)).sum(1)

    def scaled(delta: Tensor) -> Tensor:
        return summed(delta * func(input.detach(), sizes, None, None, eps))

    return input, [*_few(weight, scaled), *_few(bias, summed)]


def _product(weight: Tensor, a: Tensor, operation: Linear | Convolution) -> Parameter:
    def layer(span: slice, delta: Tensor) -> Layer:
        # Under autocast a layer computes in half precision; its gradients are added up in full.
        return Factors(
            span, operation, a.detach().to(weight.dtype), delta.to(weight.dtype)
        ).smaller()

    return weight, layer


def _few(parameter: Tensor | None, rows: Callable[[Tensor], Tensor]) -> list[Parameter]:
    """A parameter with so few numbers that its gradients are kept themselves."""
    if parameter is None:
        return []
    return [(parameter, lambda span, delta: Rows(span, rows(delta).to(parameter.dtype)))]


LAYERS: dict[Callable, Callable[..., tuple[Tensor, list[Parameter]]]] = {
    torch.conv1d: _convolved,
    torch.conv2d: _convolved,
    torch.conv3d: _convolved,
    F.linear: _mapped,
    F.batch_norm: _normed_by_batch,
    F.group_norm: _normed_by_group,
    F.layer_norm: _normed_by_layer,
}
"""Operations whose parameters' gradients are known sample by sample ↦ their input, and those
parameters; none where the call is of a kind that is not known."""

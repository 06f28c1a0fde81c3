"""Layers whose second derivative costs what the first does.

`SecondOrder` replaces operations of PyTorch's by the routes of `ROUTES`. What a route saves is
written in its module: convolutions, choices (max pooling and rectifiers), attention, smooth
activations, cross entropy, and the norms. PyTorch differentiates batch norm as if its statistics
were not fixed, and group norm in many elementwise passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsa.landscape.derivatives import cross_entropy, smooth
from lsa.landscape.derivatives.attention import attention
from lsa.landscape.derivatives.choices import max_pool2d, relu
from lsa.landscape.derivatives.convolution import DIMENSIONS, convolution, convolution_geometry
from lsa.landscape.derivatives.group_norm import channels, group_norm
from lsa.landscape.derivatives.linear import embedding, linear
from lsa.landscape.derivatives.row_norms import row_norm
from lsa.landscape.derivatives.wanted import Wanted

# Names of the nodes by which a weight is a view of a flat θ, and of the node of θ itself.
VIEWS = ("ViewBackward0", "SplitWithSizesBackward0")
LEAF = "torch::autograd::AccumulateGrad"


class SecondOrder(TorchFunctionMode):
    """Within the block, the operations of `ROUTES` are those of this module.

    For graphs that are differentiated twice by reverse mode; not for `torch.func` transforms.

    Args:
        linear: The gradient will be differentiated by its cotangents alone, in which it is linear;
            what its derivatives by the inputs would need is left out.
        values: Whether the gradient itself is wanted. If not, that by the parameters of a
            convolution may be zeros with the right derivatives: one convolution of three less.
    """

    def __init__(self, linear: bool = False, values: bool = True) -> None:
        super().__init__()
        self._wanted, self._all = Wanted(values, linear), Wanted(True, linear)

    def __exit__(self, *error: Any) -> None:
        """The forward pass has ended, with the first block."""
        self._wanted.ended = self._all.ended = True
        return super().__exit__(*error)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The same operation, by another route where there is one."""
        kwargs = kwargs or {}
        if _computed_again() or _transformed():
            return func(*args, **kwargs)
        if func in DIMENSIONS:
            return self._convolution(func, *args, **kwargs)
        if func in (F.linear, F.embedding) and not _cast():
            route = self._linear if func is F.linear else self._embedding
            return route(*args, **kwargs)
        route = ROUTES.get(func)
        return route(func, *args, **kwargs) if route else func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.ndim < 2 or weight.ndim != 2:
            return F.linear(input, weight, bias)
        return linear(input, weight, bias, self._wanted_of(weight))

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
            others = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            return F.embedding(input, weight, *others)
        return embedding(weight, input, self._wanted_of(weight))

    def _wanted_of(self, weight: Tensor) -> Wanted:
        return self._wanted if _is_view_of_leaf(weight) else self._all

    def _convolution(
        self,
        func: Callable,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or input.ndim != DIMENSIONS[func] + 2:
            return func(input, weight, bias, stride, padding, dilation, groups)
        geometry = convolution_geometry(func, stride, padding, dilation, groups)
        return convolution(input, weight, bias, geometry, self._wanted_of(weight))


def _is_view_of_leaf(w: Tensor) -> bool:
    """Whether a weight is a view of a flat θ, or a leaf itself.

    Views pass the gradient on unchanged, so that no second derivative contains its value.
    """
    if w.is_leaf:
        return w.requires_grad
    node = w.grad_fn
    while node is not None and node.name() in VIEWS:
        ((node, _),) = node.next_functions
    return node is not None and node.name() == LEAF


def _batch_norm(
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
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    return torch.addcmul(channels(shift, input), input, channels(scale, input))


def _group_norm(
    func: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if weight is None or bias is None or input.ndim < 3:
        return func(input, num_groups, weight, bias, eps)
    return group_norm(input, weight, bias, num_groups, eps)


def _transformed() -> bool:
    """Whether the network is within a transform of `torch.func` of its own (an ensemble's vmap)."""
    transforms: Any = getattr(torch._C, "_functorch")  # noqa: B009, it has no public way
    return transforms.peek_interpreter_stack() is not None


def _computed_again() -> bool:
    """Whether activation checkpointing will run this again in a backward pass, with torch's own."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009, it has no public way
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # PyTorch before 2.8
        return _within(torch.utils.checkpoint.__file__)
    hooks = top(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _within(file: str) -> bool:
    """Whether a function of a source file is among the callers."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False


def _cast() -> bool:
    """Whether torch casts inputs of operations, which functions of our own would undo."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _attention(
    func: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,  # as torch hands these over
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    fixed = attn_mask is None or not attn_mask.requires_grad
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if dropout_p or enable_gqa or not fixed or not alike or _cast():
        given = attn_mask, dropout_p, is_causal
        return func(query, key, value, *given, scale=scale, enable_gqa=enable_gqa)
    return attention(query, key, value, attn_mask, is_causal, scale)


def _layer_norm(
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if weight is None or weight.ndim != 1 or input.ndim < 2 or _cast():
        return func(input, normalized_shape, weight, bias, eps)
    return row_norm(input, weight, bias, eps, centred=True)


def _rms_norm(
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if weight is None or weight.ndim != 1 or input.ndim < 2 or _cast():
        return func(input, normalized_shape, weight, eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return row_norm(input, weight, None, eps, centred=False)


def _gelu(func: Callable, input: Tensor, approximate: str = "none") -> Tensor:
    return smooth.gelu(input) if approximate == "none" else func(input, approximate=approximate)


def _silu(func: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    return func(input, inplace=True) if inplace else smooth.silu(input)


def _hard_sigmoid(func: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    """max(0, min(6, x + 3)) / 6, of which torch has no second derivative (seen in 2.14)."""
    made = F.relu6(input + 3) / 6
    return input.copy_(made) if inplace else made


def _cross_entropy(
    func: Callable,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    classes = target.dtype == torch.int64 and target.ndim == input.ndim - 1 and input.ndim > 1
    if size_average is not None or reduce is not None or weight is not None:
        classes = False
    if label_smoothing or not classes or target.shape != input.shape[:1] + input.shape[2:]:
        given = weight, size_average, ignore_index, reduce, reduction
        return func(input, target, *given, label_smoothing=label_smoothing)
    logits = input.movedim(1, -1).flatten(0, -2)
    labels = target.flatten()
    kept = labels != ignore_index
    if not bool(((labels >= 0) & (labels < logits.shape[1]) | ~kept).all()):
        return func(input, target, ignore_index=ignore_index, reduction=reduction)  # says so
    losses = cross_entropy.cross_entropy(logits, labels, ignore_index)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


ROUTES: dict[Callable, Callable] = {
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.gelu: _gelu,
    F.silu: _silu,
    F.hardsigmoid: _hard_sigmoid,
    F.cross_entropy: _cross_entropy,
    torch.max_pool2d: max_pool2d,
    F.max_pool2d: max_pool2d,
    torch.relu: relu,
    Tensor.relu: relu,
    F.relu: relu,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
}
"""Functions beside convolutions, and what replaces them: called with the function as well."""

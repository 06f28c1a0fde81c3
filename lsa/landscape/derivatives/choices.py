"""Layers that choose among their inputs: max pooling and rectifiers.

Given the choice they are linear, so their gradient is differentiated by making the same choice
again. PyTorch does so for max pooling in another memory layout, after a copy, and for a rectifier
with a zero as large as its input, which is then added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.convolution import each_dimension

aten = torch.ops.aten


def max_pool2d(
    func: Callable,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling of images; whatever else it is called with goes to torch's own function.

    Args:
        func: Torch's own.
        input: Images `(n, c, h, w)`.
        kernel_size: As of `torch.nn.functional.max_pool2d`, and so are those that follow.
        stride: Default: that of the kernel.
        padding: In pixels.
        dilation: Between pixels of a window.
        ceil_mode: Whether windows may end beyond the image.
        return_indices: Whether positions are asked for, which torch gives.
    """
    if input.ndim != 4 or return_indices:
        return func(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    kernel = each_dimension(kernel_size, 2)
    stride = each_dimension(stride, 2) if stride else kernel
    window = (kernel, stride, each_dimension(padding, 2), each_dimension(dilation, 2), ceil_mode)
    return _MaxPool.apply(input, window)


class _MaxPool(Function):
    """The greatest of each window: a choice of inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple) -> Tensor:
        out, chosen = aten.max_pool2d_with_indices(x, *window)
        ctx.save_for_backward(x, chosen)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return _Unpool.apply(*gradients, *ctx.saved_tensors, ctx.window), None


class _Unpool(Function):
    """Gradient of max pooling: g at the chosen inputs, zero elsewhere. x gives only its shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, chosen: Tensor, window: tuple) -> Tensor:
        ctx.save_for_backward(chosen)
        return aten.max_pool2d_with_indices_backward(g, x, *window, chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (u,) = gradients
        (chosen,) = ctx.saved_tensors
        return (
            _pixels(u).gather(1, _pixels(chosen)).view(_last(chosen).shape).permute(0, 3, 1, 2),
            None,
            None,
            None,
        )


def _last(images: Tensor) -> Tensor:
    """Channels last, `(n, h, w, c)`."""
    return images.permute(0, 2, 3, 1)


def _pixels(images: Tensor) -> Tensor:
    """One row per pixel, `(n, h·w, c)`: a view of images in channels-last layout."""
    return _last(images).flatten(1, 2)


def relu(func: Callable, input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0) of a tensor of any shape; in place it goes to torch's own function, `func`."""
    return func(input, inplace=True) if inplace else _Rectifier.apply(input)


class _Rectifier(Function):
    """y = max(x, 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return _Gate.apply(*gradients, *ctx.saved_tensors)


class _Gate(Function):
    """g where y > 0, else 0. The gradient by g is the same map; y counts as constant."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return aten.threshold_backward(*gradients, *ctx.saved_tensors, 0), None

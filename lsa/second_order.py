"""Convolution and max pooling whose second derivative costs what the first does.

PyTorch differentiates the gradient of a convolution as convolutions with kernels as large as the
image, and that of max pooling in another memory layout, after a copy. Both are linear maps, so the
derivative of the gradient needs nothing but the kernels that forward and backward pass use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class SecondOrder(TorchFunctionMode):
    """Within the block, `torch.conv1d` to `conv3d` and `max_pool2d` are those of this module.

    For graphs that are differentiated twice by reverse mode; not for `torch.func` transforms.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The same operation, by another route where there is one."""
        kwargs = kwargs or {}
        if func in DIMENSIONS:
            return _convolution(func, *args, **kwargs)
        if func is torch.max_pool2d:
            return _max_pool2d(*args, **kwargs)
        return func(*args, **kwargs)


def _convolution(
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    n = DIMENSIONS[func]
    if isinstance(padding, str) or input.ndim != n + 2:
        return func(input, weight, bias, stride, padding, dilation, groups)
    geometry = (_each(stride, n), _each(padding, n), _each(dilation, n), False, [0] * n, groups)
    return _Convolution.apply(input, weight, bias, geometry)


def _each(value: Any, n: int) -> list[int]:
    """One number per dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


class _Convolution(Function):
    """y = w ∗ x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: tuple) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return aten.convolution(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (g,) = gradients
        x, w = ctx.saved_tensors
        to_x, to_w, to_b, _ = ctx.needs_input_grad
        gx, gw = _Transposed.apply(g, x, w, ctx.geometry, (to_x, to_w))
        gb = g.sum([0, *range(2, g.ndim)]) if to_b else None
        return gx, gw, gb, None


class _Transposed(Function):
    """The gradient of a convolution, gx = wᵀ ∗ g and gw = xᵀ ∗ g: linear in g and in (x, w)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: tuple, needed: tuple) -> tuple:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return aten.convolution_backward(g, x, w, None, *geometry, [*needed, False])[:2]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents u of gx and z of gw: w ∗ u + z ∗ x for g, zᵀ ∗ g for x, uᵀ ∗ g for w."""
        u, z = gradients
        g, x, w = ctx.saved_tensors
        to_g, to_x, to_w, _, _ = ctx.needs_input_grad
        dg = None
        if to_g and u is not None:
            dg = aten.convolution(u, w, None, *ctx.geometry)
        if to_g and z is not None:
            other = aten.convolution(x, z, None, *ctx.geometry)
            dg = other if dg is None else dg.add_(other)
        # One call gives both: u stands where the input stood, z where the weights did.
        needed = [to_x and z is not None, to_w and u is not None, False]
        dx = dw = None
        if any(needed):
            stand_ins = x if u is None else u, w if z is None else z
            dx, dw, _ = aten.convolution_backward(g, *stand_ins, None, *ctx.geometry, needed)
        return dg, dx, dw, None, None


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    if input.ndim != 4:
        return torch.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    kernel = _each(kernel_size, 2)
    stride = _each(stride, 2) if stride else kernel
    window = (kernel, stride, _each(padding, 2), _each(dilation, 2), ceil_mode)
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
    """g put back where the choice was made; linear in g, and x gives but its shape."""

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

"""Convolutions whose second derivative costs what the first does.

PyTorch differentiates the gradient of a convolution as convolutions with kernels as large as the
image. A convolution is linear in its input and in its weights, so the derivatives of its gradient
are convolutions with the kernels that forward and backward pass use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lsa.landscape.derivatives.wanted import Wanted

aten = torch.ops.aten
DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def convolution_geometry(
    func: Callable, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple:
    """Stride, padding, dilation and groups of a call of one of `DIMENSIONS`.

    Args:
        func: `torch.conv1d`, `torch.conv2d` or `torch.conv3d`.
        stride: A number, or one for each dimension of the images; so are the next two.
        padding: In pixels.
        dilation: Between entries of the kernel.
        groups: Of channels.

    Returns:
        What `aten.convolution` takes after input, weight and bias.
    """
    n = DIMENSIONS[func]
    return (
        each_dimension(stride, n),
        each_dimension(padding, n),
        each_dimension(dilation, n),
        False,
        [0] * n,
        groups,
    )


def each_dimension(value: Any, n: int) -> list[int]:
    """A list of n numbers, from n of them or from one for all dimensions, as torch takes it."""
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, wanted: Wanted
) -> Tensor:
    """y = w ∗ x + b.

    Args:
        input: x `(n, c, …)`, with one to three dimensions behind the channels.
        weight: w `(c', c / groups, …)`.
        bias: b `(c',)`.
        geometry: Of `convolution_geometry`.
        wanted: Which derivatives will be asked for.
    """
    return _Convolution.apply(input, weight, bias, geometry, wanted)


class _Convolution(Function):
    """y = w ∗ x + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        geometry: tuple,
        wanted: Wanted,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.wanted = geometry, wanted
        return aten.convolution(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (g,) = gradients
        x, w = (t.detach() if ctx.wanted.only_g else t for t in ctx.saved_tensors)
        valued = ctx.wanted.valued
        derivatives = _Transposed.apply(g, x, w, ctx.geometry, ctx.needs_input_grad[:3], valued)
        return *derivatives, None, None


class _Transposed(Function):
    """The gradient of a convolution: linear in g and in (x, w).

    It is gx = wᵀ ∗ g, gw = xᵀ ∗ g and gb = ∑ g.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        geometry: tuple,
        needed: tuple,
        valued: bool,
    ) -> tuple:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        to_x, to_w, to_b = needed
        if valued or not to_w:
            return aten.convolution_backward(g, x, w, [len(w)], *geometry, list(needed))
        computed = [to_x, False, False]
        gx, _, _ = aten.convolution_backward(g, x, w, None, *geometry, computed)
        zero = w.new_zeros(())
        return gx, zero.expand_as(w), zero.expand(len(w)) if to_b else None

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents u, z, c of gx, gw, gb: w ∗ u + z ∗ x + c for g, zᵀ ∗ g for x, uᵀ ∗ g."""
        u, z, c = gradients
        g, x, w = ctx.saved_tensors
        to_g, to_x, to_w, *_ = ctx.needs_input_grad
        dg = None
        for image, kernel in ((u, w), (x, z)):
            if to_g and image is not None and kernel is not None:
                part = aten.convolution(image, kernel, c, *ctx.geometry)
                dg, c = part if dg is None else dg.add_(part), None
        if to_g and c is not None:
            dg = c.view(-1, *[1] * (g.ndim - 2)).expand_as(g)
        # One call gives both: u stands where the input stood, z where the weights did.
        needed = [to_x and z is not None, to_w and u is not None, False]
        dx = dw = None
        if any(needed):
            stand_ins = x if u is None else u, w if z is None else z
            dx, dw, _ = aten.convolution_backward(g, *stand_ins, None, *ctx.geometry, needed)
        return dg, dx, dw, None, None, None

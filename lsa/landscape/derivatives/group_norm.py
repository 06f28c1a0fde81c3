"""Group norm whose second derivative is a closed form of sums over each image.

PyTorch differentiates the gradient of group norm as many elementwise operations, each of which
makes images anew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def group_norm(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
    """Group norm of images (Wu & He 2018, arXiv 1803.08494).

    Args:
        x: Images `(N, C, …)`.
        w: Scale of each channel `(C,)`.
        b: Shift of each channel `(C,)`.
        groups: Of channels that share mean and variance.
        eps: Added to the variance.
    """
    return _GroupNorm.apply(x, w, b, groups, eps)


class _GroupNorm(Function):
    """y = w x̂ + b, x̂ = (x − μ) r with mean μ and inverse deviation r of a sample's group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
        n, c, *image = x.shape
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        known = x.is_contiguous() or (last and x.device.type == "cpu")  # to the kernel
        plain = x if known else x.contiguous()
        y, mean, r = aten.native_group_norm(plain, w, b, n, c, math.prod(image), groups, eps)
        y = y if known else torch.empty_like(x).copy_(y)
        spread = c // groups
        ctx.save_for_backward(
            x, w, mean.repeat_interleave(spread, 1), r.repeat_interleave(spread, 1)
        )
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        results = _Gradient.apply(*gradients, *ctx.saved_tensors, ctx.groups)
        return *results, None, None


class _Gradient(Function):
    """gx = P(w g), gw = ∑ g x̂, gb = ∑ g; P is the Jacobian of x̂, linear and symmetric:

    P(t) = r (t − m(t) − x̂ m(t x̂)), m a group's mean. What it gives of combinations of images
    follows from sums over each image, so that no image is made but the results.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, groups: int
    ) -> tuple:
        group = _Groups(x, mean, r, groups)
        sums = group.sums(g)
        ctx.save_for_backward(g, x, w, mean, r, *sums)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        shift, by_x = group.projected(w * sums[0], w * sums[1])
        plain, normed = sums
        return _combined(shift, (x, by_x), (g, r * w)), normed.sum(0), plain.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents u, z, c of gx, gw, gb, with q = m(w g P(u)):

        w P(u) + z x̂ + c for g, P(z g − r m(w g x̂) u − r m(u x̂) w g) − r x̂ q for x, ∑ g P(u) for w.
        """
        g, x, w, mean, r, g_plain, g_normed = ctx.saved_tensors
        u, z, c = (
            torch.zeros_like(like) if part is None else part
            for part, like in zip(gradients, (x, w, w), strict=True)
        )
        group = _Groups(x, mean, r, ctx.groups)
        u_plain, u_normed = group.sums(u)
        shift, by_x = group.projected(u_plain, u_normed)  # of P(u) = r u + by_x x + shift
        of_x = z * r + w * by_x
        dg = _combined(w * shift + c - z * r * mean, (x, of_x), (u, r * w))
        # ∑ g x = ∑ g x̂/r + μ ∑ g
        tangents = (
            r * (g * u).sum(_image(x)) + by_x * (g_normed / r + mean * g_plain) + shift * g_plain
        )
        by_g = z - r * group.mean(u_normed) * w
        by_u = -r * group.mean(w * g_normed)
        shift, by_x = group.projected(
            by_g * g_plain + by_u * u_plain, by_g * g_normed + by_u * u_normed
        )
        turn = r.square() * group.mean(w * tangents)
        dx = _combined(shift + turn * mean, (x, by_x - turn), (g, r * by_g), (u, r * by_u))
        return dg, dx, tangents.sum(0), None, None, None


class _Groups:
    """Sums over the images x `(N, C, …)` and means over groups of channels, all as `(N, C)`."""

    def __init__(self, x: Tensor, mean: Tensor, r: Tensor, groups: int) -> None:
        self._x, self._mean, self._r, self._groups = x, mean, r, groups

    def sums(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """∑ t and ∑ t x̂ over each image."""
        plain = t.sum(_image(t))
        return plain, self._r * ((t * self._x).sum(_image(t)) - self._mean * plain)

    def mean(self, sums: Tensor) -> Tensor:
        """The group's mean, from sums over images."""
        grouped = sums.view(len(sums), self._groups, -1)
        size = grouped.shape[2] * self._x[0, 0].numel()
        return (grouped.sum(2, keepdim=True) / size).expand_as(grouped).reshape(sums.shape)

    def projected(self, plain: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and share of x in P(t) = r t + share x + shift, from the sums of t."""
        by_x = -self._r.square() * self.mean(normed)
        return -self._r * self.mean(plain) - by_x * self._mean, by_x


def _image(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _combined(shift: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Images times numbers `(N, C)` each, added up, and a number more."""
    (first, share), *others = terms
    combined = torch.addcmul(channels(shift, first), first, channels(share, first))
    for image, share in others:
        combined.addcmul_(image, channels(share, image))
    return combined


def channels(values: Tensor, like: Tensor) -> Tensor:
    """Values of channels, `(C,)` or `(N, C)`, shaped for broadcasting over images `(N, C, …)`."""
    return values.view(*values.shape, *[1] * (like.ndim - 2))

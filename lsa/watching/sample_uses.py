"""The gradients of single samples in the form in which layers have them, and their squares.

With the inputs a of a layer and δ, the gradient at its outputs, the part cᵢ of sample i in the
gradient is bilinear in aᵢ and δᵢ (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv
1912.06015). |cᵢ|² needs no cᵢ where positions are few:

    |∑ₜ δₜ aₜᵀ|² = ∑ₜₛ (aₜ·aₛ)(δₜ·δₛ).

A parameter that is used more than once, as a tied embedding, takes the products of its uses too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape.derivatives.convolution import convolution_geometry
from lsa.landscape.derivatives.layer_gradients import Convolution

HELD = 1 << 24  # numbers of single samples that are held at once
CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


class Products(NamedTuple):
    """Weights of y = W a, at some positions of each sample."""

    a: Tensor  # (n, T, inputs)
    delta: Tensor  # (n, T, outputs)

    def rows(self) -> Tensor:
        """cᵢ, `(n, outputs, inputs)`."""
        return self.delta.mT @ self.a

    def total(self) -> Tensor:
        """∑ cᵢ."""
        return self.delta.flatten(0, 1).mT @ self.a.flatten(0, 1)

    def along(self, r: Tensor) -> Tensor:
        """∑ cᵢ r, without ∑ cᵢ."""
        return self.delta.flatten(0, 1).mT @ (self.a.flatten(0, 1) @ r.to(self.a.dtype))


class Lookups(NamedTuple):
    """Weights of a table of which some rows are read."""

    ids: Tensor  # (n, T)
    delta: Tensor  # (n, T, width)
    entries: int

    def rows(self) -> Tensor:
        """cᵢ, `(n, entries, width)`."""
        n, _, width = self.delta.shape
        index = self.ids[:, :, None].expand_as(self.delta)
        return self.delta.new_zeros(n, self.entries, width).scatter_add_(1, index, self.delta)

    def total(self) -> Tensor:
        """∑ cᵢ."""
        sums = self.delta.new_zeros(self.entries, self.delta.shape[2])
        return sums.index_add_(0, self.ids.flatten(), self.delta.flatten(0, 1))

    def along(self, r: Tensor) -> Tensor:
        """∑ cᵢ r, without ∑ cᵢ."""
        sums = self.delta.new_zeros(self.entries)
        return sums.index_add_(
            0, self.ids.flatten(), (self.delta @ r.to(self.delta.dtype)).flatten()
        )


class Convolved(NamedTuple):
    """Weights of a convolution."""

    a: Tensor  # (n, channels, …)
    delta: Tensor
    operation: Convolution

    def rows(self) -> Tensor:
        """cᵢ, each in the shape of the weights."""
        return self.operation.gradients(self.a, self.delta)

    def total(self) -> Tensor:
        """∑ cᵢ."""
        return self.operation.gradient(self.a, self.delta).view(self.operation.shape)

    def along(self, r: Tensor) -> Tensor:
        """∑ cᵢ r."""
        return self.total().float() @ r


class Few(NamedTuple):
    """Parameters so small that the cᵢ are kept themselves: biases, scales."""

    values: Tensor  # (n, p)

    def rows(self) -> Tensor:
        """cᵢ."""
        return self.values

    def total(self) -> Tensor:
        """∑ cᵢ."""
        return self.values.sum(0)

    def along(self, r: Tensor) -> Tensor:
        """∑ cᵢ r, the last dimension of the parameter being that of r."""
        return self.total().float().view(-1, len(r)) @ r


Use = Products | Lookups | Convolved | Few
Part = tuple[nn.Parameter, Use]


def squares(uses: Sequence[Use]) -> Tensor:
    """∑ |cᵢ|² over the samples in float64, of a parameter that is used so."""
    total = torch.zeros((), dtype=torch.float64, device=uses[0][0].device)
    for i, u in enumerate(uses):
        total += sum(_product(part, part) for part in _parts(u))
        for v in uses[i + 1 :]:
            total += 2 * _product(u, v)
    return total


def _product(u: Use, v: Use) -> Tensor:
    """∑ cᵢ·c'ᵢ of two uses of one parameter."""
    if isinstance(u, Lookups) and isinstance(v, Lookups):
        same = u.ids[:, :, None] == v.ids[:, None]
        return ((u.delta @ v.delta.mT) * same).sum(dtype=torch.float64)
    if isinstance(v, Lookups) and isinstance(u, Products):
        u, v = v, u
    if isinstance(u, Lookups) and isinstance(v, Products):
        chosen = v.delta.gather(2, u.ids[:, None].expand(-1, v.delta.shape[1], -1))
        a, delta = _alike(v.a, u.delta)
        return ((a @ delta.mT) * chosen).sum(dtype=torch.float64)
    if isinstance(u, Products) and isinstance(v, Products) and not (u is v and _wide(u)):
        (a, b), (delta, other) = _alike(u.a, v.a), _alike(u.delta, v.delta)
        return ((a @ b.mT) * (delta @ other.mT)).sum(dtype=torch.float64)
    a, b = u.rows().flatten(1), v.rows().flatten(1)
    return (a * b).sum(dtype=torch.float64)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in the wider of their precisions: autocast leaves embeddings in float32."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _wide(u: Products) -> bool:
    """Whether the cᵢ themselves take less time than products of positions."""
    positions, inputs, outputs = u.a.shape[1], u.a.shape[2], u.delta.shape[2]
    return positions * (inputs + outputs) > inputs * outputs


def _parts(u: Use) -> Iterator[Use]:
    """The same use by so many samples as may be held at once."""
    if isinstance(u, Few):
        yield u
        return
    if isinstance(u, Convolved):
        each = u.operation.shape.numel()
    elif isinstance(u, Lookups):
        each = u.ids.shape[1] ** 2
    else:
        each = u.a.shape[2] * u.delta.shape[2] if _wide(u) else u.a.shape[1] ** 2
    size = max(1, HELD // max(1, each))
    for a, delta in zip(u[0].split(size), u[1].split(size), strict=True):
        yield u._replace(**{u._fields[0]: a, "delta": delta})  # pyright: ignore


def _linear(module: Any, a: Tensor, delta: Tensor) -> Iterator[Part]:
    a, delta = (t.reshape(len(t), -1, t.shape[-1]) for t in (a.to(delta.dtype), delta))
    # GPT-2's Conv1D has its weights the other way round: y = a W + b.
    turned = not isinstance(module, nn.Linear)
    yield module.weight, Products(delta, a) if turned else Products(a, delta)
    if module.bias is not None:
        yield module.bias, Few(delta.sum(1))


def _embedding(module: Any, ids: Tensor, delta: Tensor) -> Iterator[Part]:
    if module.padding_idx is not None:
        delta = delta * (ids != module.padding_idx)[..., None]
    n = len(ids)
    delta = delta.reshape(n, -1, delta.shape[-1])
    yield module.weight, Lookups(ids.reshape(n, -1), delta, len(module.weight))


def _convolution(module: Any, a: Tensor, delta: Tensor) -> Iterator[Part]:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return
    options = module.stride, module.padding, module.dilation, module.groups
    geometry = convolution_geometry(CONVOLUTIONS[a.ndim - 2], *options)
    operation = Convolution(module.weight.shape, geometry)
    yield module.weight, Convolved(a.to(delta.dtype), delta, operation)
    if module.bias is not None:
        yield module.bias, Few(delta.flatten(2).sum(2))


def _normed(module: Any, a: Tensor, delta: Tensor) -> Iterator[Part]:
    """y = w x̂ + b, one number of each per feature or channel."""
    a = a.to(delta.dtype)
    if isinstance(module, nn.GroupNorm):
        normed, over = F.group_norm(a, module.num_groups, eps=module.eps), [*range(2, a.ndim)]
    else:
        shape = [*module.normalized_shape]
        form: Any = F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
        normed, over = form(a, shape, eps=module.eps), [*range(1, a.ndim - len(shape))]

    def rows(each: Tensor) -> Few:
        return Few((each.sum(over) if over else each).flatten(1))

    if module.weight is not None:
        yield module.weight, rows(delta * normed)
    bias: Any = getattr(module, "bias", None)
    if bias is not None:
        yield bias, rows(delta)


LAYERS: dict[type[nn.Module], Callable[..., Iterator[Part]]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: _normed,
    nn.RMSNorm: _normed,
    nn.GroupNorm: _normed,
}


def form_of(module: nn.Module) -> Callable[..., Iterator[Part]] | None:
    """What gives a layer's parts from (module, inputs, δ); None of a layer that is not known."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's: y = a W + b
        return _linear
    return next((form for kind, form in LAYERS.items() if isinstance(module, kind)), None)

"""Per-sample gradients gᵢ = ∇ℓᵢ(θ) in the form in which the layers of a network have them.

With the inputs a of a layer and δ = ∂(∑ⱼ ℓⱼ)/∂y at its outputs y, the part of gᵢ that belongs to
its weights is bilinear in aᵢ and δᵢ (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv
1912.06015, for convolutions). What is wanted of the gᵢ, slopes gᵢ·v and sums ∑ cᵢ gᵢ, takes one
operation of the layer's kind each: no pass through the network, no `(n, d)` array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lsa.derivatives.slabs import Slabs

aten = torch.ops.aten
BLOCK = 1 << 18  # numbers in half precision made float32 at once: a core's cache holds them
COLUMNS = 1 << 20  # numbers under the kernels of a convolution that are copied at once


@dataclass(frozen=True)
class SampleGradients:
    """The gᵢ of n samples as the layers have them: the Jacobian of the losses, `(n, d)`."""

    n: int
    d: int
    layers: Sequence[Layer]

    def push(self, v: Tensor) -> Tensor:
        """Slopes gᵢ·v, `(n,)`."""
        return torch.stack([layer.push(v[layer.place]) for layer in self.layers]).sum(0)

    def pull(self, c: Tensor) -> Tensor:
        """∑ cᵢ gᵢ, `(d,)`."""
        total = c.new_zeros(self.d)
        for layer in self.layers:
            total[layer.place] += layer.pull(c)
        return total

    def rows(self) -> Tensor:
        """gᵢ, `(n, d)`."""
        rows = self.layers[0].held[0].new_zeros(self.n, self.d)
        for layer in self.layers:
            rows[:, layer.place] += layer.rows()
        return rows

    def in_rows(self) -> SampleGradients:
        """The same, held as `rows`."""
        return SampleGradients(self.n, self.d, [Rows(slice(0, self.d), self.rows())])

    def compact(self, memory: Slabs) -> SampleGradients:
        """The same in memory of its own, where that is less as rows in half precision."""
        own: dict[int, Tensor] = {}

        def copy(t: Tensor) -> Tensor:
            if t.untyped_storage().nbytes() > t.nbytes:  # a part of the data
                return t
            if t.data_ptr() not in own:  # else layers share it
                own[t.data_ptr()] = memory.copy(t)
            return own[t.data_ptr()]

        def least(layer: Layer) -> Layer:
            if isinstance(layer, Factors):
                if layer.less_as_half():
                    return HalfRows.of(layer, memory)
                return replace(layer, a=copy(layer.a), delta=copy(layer.delta))
            return replace(layer, values=copy(layer.values))

        return SampleGradients(self.n, self.d, [least(layer) for layer in self.layers])

    @property
    def nbytes(self) -> int:
        """Bytes held; what layers share counts once."""
        return size(tensor for layer in self.layers for tensor in layer.held)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that may share memory, or be parts of a larger one that is not counted."""
    held: dict[int, int] = {}
    for t in tensors:
        start = t.data_ptr()
        held[start] = max(held.get(start, 0), min(t.nbytes, t.untyped_storage().nbytes()))
    return sum(held.values())


@dataclass(frozen=True)
class Rows:
    """The gradients of a parameter of p numbers, themselves."""

    place: slice  # of the parameter in θ
    values: Tensor  # (n, p)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return (self.values,)

    def push(self, v: Tensor) -> Tensor:
        """Slopes `(n,)` for v `(p,)`."""
        return self.values @ v

    def pull(self, c: Tensor) -> Tensor:
        """Their sum with weights c `(n,)`, `(p,)`."""
        return c @ self.values

    def rows(self) -> Tensor:
        """All, `(n, p)`."""
        return self.values


@dataclass(frozen=True)
class HalfRows:
    """The gradients of a parameter, each in units of its largest number and in half precision.

    Rounding moves a gradient by 2·10⁻⁴ of its length in a direction of its own, so that Cv for an
    eigenvector of C = 1/n ∑ gᵢgᵢᵀ moves by 2·10⁻⁴ √(tr C / (λ n)) of its length, and λ, to which
    these directions are nearly orthogonal, by much less. A product only reads them, as `Rows`.
    """

    place: slice  # of the parameter in θ
    values: Tensor  # (n, p), float16
    units: Tensor  # (n, 1)

    @classmethod
    def of(cls, layer: Factors, memory: Slabs) -> HalfRows:
        """Those of a layer."""
        n, p = len(layer.a), layer.place.stop - layer.place.start
        values = memory.empty((n, p), torch.float16, layer.a.device)
        units = layer.a.new_ones(n, 1)
        few = max(1, BLOCK // p)
        parts = (t.split(few) for t in (layer.a, layer.delta, values, units))
        for a, delta, halves, unit in zip(*parts, strict=True):
            rows = layer.operation.gradients(a, delta)
            largest = rows.abs().amax(1, keepdim=True)
            unit.copy_(largest.masked_fill_(largest == 0, 1))
            halves.copy_(rows.div_(unit))
        return cls(layer.place, values, units)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return self.values, self.units

    def push(self, v: Tensor) -> Tensor:
        """Slopes `(n,)` for v `(p,)`."""
        return torch.cat([rows.to(v.dtype) @ v for rows in self._blocks()]) * self.units[:, 0]

    def pull(self, c: Tensor) -> Tensor:
        """Their sum with weights c `(n,)`, `(p,)`."""
        blocks = self._blocks()
        total = c.new_zeros(self.values.shape[1])
        for rows, weights in zip(blocks, (c * self.units[:, 0]).split(len(blocks[0])), strict=True):
            total.addmv_(rows.to(c.dtype).T, weights)
        return total

    def rows(self) -> Tensor:
        """All, `(n, p)`."""
        return self.values * self.units

    def _blocks(self) -> Sequence[Tensor]:
        return self.values.split(max(1, BLOCK // self.values.shape[1]))


@dataclass(frozen=True)
class Factors:
    """The gradients of the weights of y = W(a), as a and δ."""

    place: slice  # of the weights in θ
    operation: Linear | Convolution
    a: Tensor  # (n, …)
    delta: Tensor  # (n, …), like y

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return self.a, self.delta

    def push(self, v: Tensor) -> Tensor:
        """Slopes `(n,)` for v `(p,)`."""
        return (self.operation.outputs(self.a, v) * self.delta).flatten(1).sum(1)

    def pull(self, c: Tensor) -> Tensor:
        """Their sum with weights c `(n,)`, `(p,)`."""
        scaled = self.delta * c.view(-1, *[1] * (self.delta.ndim - 1))
        return self.operation.gradient(self.a, scaled)

    def rows(self) -> Tensor:
        """All, `(n, p)`."""
        return self.operation.gradients(self.a, self.delta)

    def smaller(self) -> Layer:
        """The gradients themselves where they are fewer numbers than a and δ."""
        return Rows(self.place, self.rows()) if self._of_rows < self._of_factors else self

    def less_as_half(self) -> bool:
        """Whether `HalfRows` of float32 are less memory; a GPU's are not measured."""
        halves = self.delta.dtype == torch.float32 and self.delta.device.type == "cpu"
        return halves and self._of_rows < 2 * self._of_factors

    @property
    def _of_rows(self) -> int:
        """Numbers of all rows."""
        return len(self.a) * (self.place.stop - self.place.start)

    @property
    def _of_factors(self) -> int:
        """Numbers of a and δ."""
        return sum(t.numel() for t in self.held)


Layer = Rows | HalfRows | Factors


@dataclass(frozen=True)
class Linear:
    """y = a Wᵀ."""

    shape: torch.Size  # of W

    def outputs(self, a: Tensor, w: Tensor) -> Tensor:
        """y for flat weights `(p,)`."""
        return F.linear(a, w.view(self.shape))

    def inputs(self, delta: Tensor, a: Tensor, w: Tensor) -> Tensor:
        """Gradient of δ·y by the inputs, like a."""
        return delta @ w.view(self.shape)

    def gradient(self, a: Tensor, delta: Tensor) -> Tensor:
        """Gradient of δ·y by the weights, `(p,)`."""
        return (delta.flatten(0, -2).T @ a.flatten(0, -2)).flatten()

    def gradients(self, a: Tensor, delta: Tensor) -> Tensor:
        """That of each sample, `(n, p)`."""
        a, delta = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, delta))
        return (delta.mT @ a).flatten(1)


@dataclass(frozen=True)
class Convolution:
    """y = W ∗ a."""

    shape: torch.Size  # of W
    geometry: tuple  # as `aten.convolution` takes it; the last is the number of groups

    def outputs(self, a: Tensor, w: Tensor) -> Tensor:
        """y for flat weights `(p,)`."""
        return aten.convolution(a, w.view(self.shape), None, *self.geometry)

    def inputs(self, delta: Tensor, a: Tensor, w: Tensor) -> Tensor:
        """Gradient of δ·y by the inputs, like a."""
        w, only = w.view(self.shape), [True, False, False]
        return aten.convolution_backward(delta, a, w, None, *self.geometry, only)[0]

    def gradient(self, a: Tensor, delta: Tensor) -> Tensor:
        """Gradient of δ·y by the weights, `(p,)`."""
        return self._gradient(a, delta, self.shape, self.geometry).flatten()

    def gradients(self, a: Tensor, delta: Tensor) -> Tensor:
        """That of each sample, `(n, p)`."""
        n, kernel = len(a), self.shape[2:]
        *geometry, groups = self.geometry
        stride, padding, dilation = geometry[:3]
        if len(kernel) == 2 and groups == 1:
            if a.device.type == "cpu" and a.is_contiguous(memory_format=torch.channels_last):
                return self._gradients_by_columns(a, delta)
            patches = F.unfold(a, kernel, dilation, padding, stride)  # (n, p/outputs, positions)
            return (delta.flatten(2) @ patches.mT).flatten(1)
        # All samples as groups of channels of one.
        a, delta = (t.reshape(1, -1, *t.shape[2:]) for t in (a, delta))
        shape = [n * self.shape[0], *self.shape[1:]]
        return self._gradient(a, delta, shape, (*geometry, n * groups)).view(n, -1)

    def _gradients_by_columns(self, a: Tensor, delta: Tensor) -> Tensor:
        """`gradients` of images that lie with the channels last, as many at once as a cache holds.

        The pixels under the kernel are copied row by row of it, which takes a third of the time of
        `F.unfold`; twice as fast in all.
        """
        outputs, inputs, *kernel = self.shape
        (down, right), (top, left), dilation = self.geometry[:3]
        positions = math.prod(delta.shape[2:])
        few = max(1, COLUMNS // (positions * math.prod(self.shape[1:])))
        found = a.new_empty(len(a), outputs, inputs, *kernel)
        for images, deltas, part in zip(*(t.split(few) for t in (a, delta, found)), strict=True):
            padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
            n, y, x, channel = padded.stride()
            under = padded.as_strided(
                (len(images), *delta.shape[2:], *kernel, inputs),
                (n, y * down, x * right, y * dilation[0], x * dilation[1], channel),
            )
            columns = under.reshape(len(images), positions, -1)
            pixels = deltas.permute(0, 2, 3, 1).flatten(1, 2)  # (n, positions, outputs)
            products = pixels.mT @ columns  # (n, outputs, kernel × inputs)
            part.copy_(products.view(-1, outputs, *kernel, inputs).permute(0, 1, 4, 2, 3))
        return found.flatten(1)

    @staticmethod
    def _gradient(a: Tensor, delta: Tensor, shape: Sequence[int], geometry: Sequence) -> Tensor:
        stand_in, only = a.new_empty(()).expand(*shape), [False, True, False]
        return aten.convolution_backward(delta, a, stand_in, None, *geometry, only)[1]

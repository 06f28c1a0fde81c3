"""Per-sample gradients gᵢ = ∇ℓᵢ(θ) in the form in which the layers of a network have them.

With the inputs a of a layer and δ = ∂(∑ⱼ ℓⱼ)/∂y at its outputs y, the part of gᵢ that belongs to
its weights is bilinear in aᵢ and δᵢ (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv
1912.06015, for convolutions). What is wanted of the gᵢ, slopes gᵢ·v and sums ∑ cᵢ gᵢ, takes one
operation of the layer's kind each: no pass through the network, no `(n, d)` array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
COLUMNS = 1 << 19  # numbers under the kernels of a convolution that are copied at once
# Positions of a sample (tokens, pixels of an output) from which on rows are read faster than a and
# δ are multiplied. On an EPYC both took as long at 8 to 12; a linear layer with one position took a
# tenth of the time of its rows, with 64 five times as long.
POSITIONS = 10


@dataclass(frozen=True)
class SampleGradients:
    """The gᵢ of n samples as the layers have them: the Jacobian of the losses, `(n, d)`."""

    n: int
    d: int
    layers: Sequence[Layer]

    def push(self, v: Tensor) -> Tensor:
        """Slopes gᵢ·v, `(n,)`."""
        slopes = v.new_zeros(self.n)
        for layer in self.layers:
            slopes += layer.push(v[layer.span])
        return slopes

    def pull(self, c: Tensor) -> Tensor:
        """∑ cᵢ gᵢ, `(d,)`."""
        total = c.new_zeros(self.d)
        for layer in self.layers:
            total[layer.span] += layer.pull(c)
        return total

    def normal(self, v: Tensor) -> Tensor:
        """∑ gᵢ (gᵢ·v), `(d,)`."""
        return self.pull(self.push(v))

    def rows(self) -> Tensor:
        """gᵢ, `(n, d)`."""
        return _rows(self.n, self.layers, slice(0, self.d)).values

    def grams(self) -> dict[tuple[int, int], Tensor] | None:
        """Products gᵢ·gⱼ `(n, n)` of the part of each parameter, by its (start, stop) in θ.

        None where some layer has more than one position of a sample, or meets a parameter again:
        the products then take longer than gradients do.
        """
        spans = [(layer.span.start, layer.span.stop) for layer in self.layers]
        known = [layer.gram() for layer in self.layers]
        if len(set(spans)) < len(spans) or any(gram is None for gram in known):
            return None
        return {span: gram for span, gram in zip(spans, known, strict=True) if gram is not None}

    def faster(self, room: float) -> SampleGradients:
        """The same, with layers of many positions as rows, as far as all fits in `room` bytes.

        Products are faster with these rows. Rows of parameters that are neighbours in θ lie in one
        tensor. If the layers hold more than `room` as they are, they stay as they are.
        """
        slow = [layer for layer in self.layers if isinstance(layer, Factors) and layer.slow]
        as_rows = {id(layer) for layer in self.layers if isinstance(layer, Rows)}
        for layer in sorted(slow, key=lambda layer: layer.saved_per_number, reverse=True):
            if self._nbytes(as_rows | {id(layer)}) <= room:
                as_rows.add(id(layer))
        layers = [layer for layer in self.layers if id(layer) not in as_rows]
        runs: list[list[Layer]] = []
        for layer in sorted(self.layers, key=lambda layer: layer.span.start):
            if id(layer) in as_rows:
                if not runs or runs[-1][-1].span.stop < layer.span.start:
                    runs.append([])
                runs[-1].append(layer)
        for run in runs:
            layers.append(_rows(self.n, run, slice(run[0].span.start, run[-1].span.stop)))
        return SampleGradients(self.n, self.d, layers)

    def split(self, size: int) -> Iterator[SampleGradients]:
        """The same in blocks of at most `size` samples."""
        for i in range(0, self.n, size):
            layers = [layer.of(slice(i, i + size)) for layer in self.layers]
            yield SampleGradients(min(size, self.n - i), self.d, layers)

    @property
    def nbytes(self) -> int:
        """Bytes held; what layers share counts once."""
        return self._nbytes(set())

    def _nbytes(self, as_rows: set[int]) -> int:
        """Bytes that would be held with the layers of these ids as rows."""
        kept = [t for layer in self.layers if id(layer) not in as_rows for t in layer.held]
        spans = {
            (layer.span.start, layer.span.stop) for layer in self.layers if id(layer) in as_rows
        }
        each = self.layers[0].held[0].element_size()
        return size(kept) + self.n * each * sum(stop - start for start, stop in spans)


def _rows(n: int, layers: Sequence[Layer], span: slice) -> Rows:
    """The gradients of layers whose parameters lie in a span of θ, as one row a sample."""
    rows = layers[0].held[0].new_zeros(n, span.stop - span.start)
    for layer in layers:
        each = layer.rows()
        own = rows[:, layer.span.start - span.start : layer.span.stop - span.start]
        own.unflatten(1, each.shape[1:]).add_(each)
    return Rows(span, rows)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that may share memory, or be parts of a larger one that is not counted."""
    held: dict[int, int] = {}
    for t in tensors:
        if t.layout != torch.strided:  # a sparse or nested input, which the batch holds anyway
            continue
        start = t.data_ptr()
        held[start] = max(held.get(start, 0), min(t.nbytes, t.untyped_storage().nbytes()))
    return sum(held.values())


@dataclass(frozen=True)
class Rows:
    """The gradients of a parameter of p numbers, themselves."""

    span: slice  # of the parameter in θ
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

    def gram(self) -> Tensor | None:
        """Their products with each other, `(n, n)`."""
        return self.values @ self.values.T

    def of(self, samples: slice) -> Rows:
        """Those of some samples."""
        return replace(self, values=self.values[samples])


def _few(numbers: int, each: int) -> int:
    """Samples of so many numbers each that are about `numbers` in all.

    As many for every thread: three on two threads take a third longer than four, sample by sample.
    """
    threads = torch.get_num_threads()
    return threads * max(1, round(numbers / each / threads))


@dataclass(frozen=True)
class Factors:
    """The gradients of the weights of y = W(a), as a and δ."""

    span: slice  # of the weights in θ
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
        """All, each in the shape of the weights."""
        return self.operation.gradients(self.a, self.delta)

    def gram(self) -> Tensor | None:
        """Products gᵢ·gⱼ `(n, n)` of the gradients; None where samples have several positions."""
        if not isinstance(self.operation, Linear) or self.a.ndim != 2:
            return None
        return (self.a @ self.a.T) * (self.delta @ self.delta.T)

    def of(self, samples: slice) -> Factors:
        """Those of some samples."""
        return replace(self, a=self.a[samples], delta=self.delta[samples])

    @property
    def slow(self) -> bool:
        """Whether reading rows takes less time than multiplying a and δ."""
        return self.operation.positions(self.delta) >= POSITIONS

    @property
    def saved_per_number(self) -> float:
        """Multiplications that rows would save for each number that they hold more."""
        more = max(1, self._of_rows - self._of_factors)
        return self.operation.positions(self.delta) * self._of_rows / more

    def smaller(self) -> Layer:
        """The gradients themselves where they are fewer numbers than a and δ."""
        fewer = self._of_rows < self._of_factors
        return Rows(self.span, self.rows().flatten(1)) if fewer else self

    @property
    def _of_rows(self) -> int:
        """Numbers of all rows."""
        return len(self.a) * (self.span.stop - self.span.start)

    @property
    def _of_factors(self) -> int:
        """Numbers of a and δ."""
        return sum(t.numel() for t in self.held)


Layer = Rows | Factors


@dataclass(frozen=True)
class Linear:
    """y = a Wᵀ."""

    shape: torch.Size  # of W

    def positions(self, delta: Tensor) -> int:
        """To how many inputs of a sample W is applied."""
        return math.prod(delta.shape[1:-1])

    def outputs(self, a: Tensor, w: Tensor) -> Tensor:
        """Outputs y for inputs a `(n, …)` and flat weights w `(p,)`."""
        return F.linear(a, w.view(self.shape))

    def inputs(self, delta: Tensor, a: Tensor, w: Tensor) -> Tensor:
        """Gradient of δ·y by the inputs, of the shape of a; δ of that of y, w `(p,)`."""
        return delta @ w.view(self.shape)

    def gradient(self, a: Tensor, delta: Tensor) -> Tensor:
        """Gradient of δ·y by the weights `(p,)`, summed over the samples."""
        return (delta.flatten(0, -2).T @ a.flatten(0, -2)).flatten()

    def gradients(self, a: Tensor, delta: Tensor) -> Tensor:
        """Gradients by the weights of each sample, `(n, *W.shape)`."""
        a, delta = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, delta))
        return delta.mT @ a


@dataclass(frozen=True)
class Convolution:
    """y = W ∗ a."""

    shape: torch.Size  # of W
    geometry: tuple  # as `aten.convolution` takes it; the last is the number of groups

    def positions(self, delta: Tensor) -> int:
        """To how many inputs of a sample W is applied."""
        return math.prod(delta.shape[2:])

    def outputs(self, a: Tensor, w: Tensor) -> Tensor:
        """Outputs y for inputs a `(n, …)` and flat weights w `(p,)`."""
        return aten.convolution(a, w.view(self.shape), None, *self.geometry)

    def inputs(self, delta: Tensor, a: Tensor, w: Tensor) -> Tensor:
        """Gradient of δ·y by the inputs, of the shape of a; δ of that of y, w `(p,)`."""
        w, only = w.view(self.shape), [True, False, False]
        return aten.convolution_backward(delta, a, w, None, *self.geometry, only)[0]

    def gradient(self, a: Tensor, delta: Tensor) -> Tensor:
        """Gradient of δ·y by the weights `(p,)`, summed over the samples."""
        return self._gradient(a, delta, self.shape, self.geometry).flatten()

    def gradients(self, a: Tensor, delta: Tensor) -> Tensor:
        """Gradients by the weights of each sample, `(n, *W.shape)`, in any order in memory."""
        n, kernel = len(a), self.shape[2:]
        *geometry, groups = self.geometry
        stride, padding, dilation = geometry[:3]
        if len(kernel) == 2 and groups == 1:
            if a.device.type == "cpu" and a.is_contiguous(memory_format=torch.channels_last):
                return self._gradients_by_columns(a, delta)
            patches = F.unfold(a, kernel, dilation, padding, stride)  # (n, p/outputs, positions)
            return (delta.flatten(2) @ patches.mT).view(n, *self.shape)
        # All samples as groups of channels of one.
        a, delta = (t.reshape(1, -1, *t.shape[2:]) for t in (a, delta))
        shape = [n * self.shape[0], *self.shape[1:]]
        return self._gradient(a, delta, shape, (*geometry, n * groups)).view(n, *self.shape)

    def _gradients_by_columns(self, a: Tensor, delta: Tensor) -> Tensor:
        """`gradients` of images that lie with the channels last, as many at once as a cache holds.

        The pixels under the kernel are copied row by row of it, which takes a third of the time of
        `F.unfold`; twice as fast in all. In memory a sample's are (outputs, kernel, inputs).
        """
        outputs, inputs, *kernel = self.shape
        (down, right), (top, left), dilation = self.geometry[:3]
        under = inputs * math.prod(kernel)
        positions = math.prod(delta.shape[2:])
        gradients = a.new_empty(len(a), outputs, under)
        parts = (t.split(_few(COLUMNS, positions * under)) for t in (a, delta, gradients))
        for images, deltas, part in zip(*parts, strict=True):
            padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
            n, y, x, channel = padded.stride()
            columns = padded.as_strided(
                (len(images), *delta.shape[2:], *kernel, inputs),
                (n, y * down, x * right, y * dilation[0], x * dilation[1], channel),
            )
            pixels = deltas.permute(0, 2, 3, 1).flatten(1, 2)  # (n, positions, outputs)
            torch.bmm(pixels.mT, columns.reshape(len(images), positions, under), out=part)
        return gradients.view(-1, outputs, *kernel, inputs).permute(0, 1, 4, 2, 3)

    @staticmethod
    def _gradient(a: Tensor, delta: Tensor, shape: Sequence[int], geometry: Sequence) -> Tensor:
        stand_in, only = a.new_empty(()).expand(*shape), [False, True, False]
        return aten.convolution_backward(delta, a, stand_in, None, *geometry, only)[1]

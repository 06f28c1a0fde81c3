"""A data set as tensors of inputs and targets, cut into chunks, with a loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lsa.landscape.derivatives.parts import Part
from lsa.landscape.network import HALF, Network
from lsa.landscape.values import misclassified
from lsa.landscape.weighing import (
    Loss,
    Weighing,
    differing,
    given,
    mean_over_samples,
    of_samples,
    separate,
    weighing,
)
from lsa.runtime.errors import InputError


@dataclass
class Samples:
    """Inputs `(N, …)`, targets `(N, …)` and a loss, computed `chunk` samples at a time.

    Raises:
        InputError: As many inputs as targets are not given, or no target counts.
    """

    x: Tensor
    y: Tensor
    loss: Loss
    chunk: int
    how: Weighing | None = None  # how the loss weighs; None: not tried yet
    one_tensor: bool = True  # whether the loss takes one; else a tuple, dict or other pytree
    ratios: Tensor | None = field(init=False, default=None)
    """(N,): N wᵢ/W, the weight of each sample over the mean weight; None: all alike."""
    _mean_weight: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) == 0:
            raise InputError(
                f"{len(self.x)} inputs and {len(self.y)} targets; give as many of each, at least 1"
            )
        self.how = self.how or weighing(self.loss)
        weights = self.how.weights(self.y) if self.how else None
        if weights is None:
            return
        total = weights.sum()
        if not total > 0:
            raise InputError(
                "no target counts: all are ignored or weigh 0; choose samples of which some count"
            )
        if not bool((weights == weights[0]).all()):
            self.ratios = weights * (len(weights) / total)
        self._mean_weight = float(total) / len(weights)

    @property
    def n(self) -> int:
        """Number N of samples."""
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return self.x.device

    @property
    def leaves_out(self) -> bool:
        """Whether some sample does not count."""
        return self.ratios is not None and bool((self.ratios == 0).any())

    def try_loss(self, network: Network) -> None:
        """Check that an unknown loss is a mean over samples, on samples that differ.

        Raises:
            InputError: It is none, or depends on trainable tensors beside the outputs.
        """
        if self.how is None:
            some = torch.cat([differing(self.y, 5), differing(self.x, 5)]).unique()
            some = some.to(self.x.device)
            theta = network.flat().to(self.x.device)
            with torch.no_grad(), network.at(theta):
                outputs = given(self.loss, network(self.x[some]))
                several = of_samples(
                    outputs,
                    self.y[some],
                    lambda: given(self.loss, network(self.x[some[:-1]])),
                )
            self.one_tensor = isinstance(outputs, Tensor)
            self.how = mean_over_samples(self.loss, outputs, self.y[some], several)

    def counts(self, i: int) -> bool:
        """Whether sample i has any weight."""
        return self.ratios is None or bool(self.ratios[i] > 0)

    def first_counted(self) -> int:
        """The first sample that has any weight."""
        return 0 if self.ratios is None else int((self.ratios > 0).nonzero()[0])

    def subset(self, indices: Tensor) -> Samples:
        """Some of the samples, by their indices `(n,)`."""
        return replace(self, x=self.x[indices], y=self.y[indices])

    def other(self, x: Tensor, y: Tensor) -> Samples:
        """The same loss on other inputs `(n, …)` and targets `(n, …)`, weighed as before."""
        return replace(self, x=x, y=y)

    def anew(self, x: Tensor, y: Tensor, chunk: int) -> Samples:
        """The same loss on other samples; how it weighs them is checked again.

        Args:
            x: Inputs `(n, …)`.
            y: Targets `(n, …)`.
            chunk: Samples per pass.
        """
        return replace(self, x=x, y=y, chunk=chunk, how=None)

    def in_chunks(self, chunk: int) -> Samples:
        """The same samples, so many at a time."""
        return replace(self, chunk=chunk)

    def in_one_pass(self) -> Samples:
        """The same samples, all at once and in one process."""
        return replace(self, chunk=self.n)

    def double(self) -> Samples:
        """The same samples and loss in float64."""
        x, y = (t.double() if t.is_floating_point() else t for t in (self.x, self.y))
        loss = self.loss
        if isinstance(loss, torch.nn.Module):  # whose weights are tensors of their own precision
            loss = copy.deepcopy(loss).double()
        return replace(self, x=x, y=y, loss=loss, how=None if weighing(loss) else self.how)

    def parts(
        self, network: Network, rows: slice = slice(None), size: int | None = None
    ) -> list[Part]:
        """Chunks of the samples, each as functions of θ.

        Args:
            network: The network, whose parameters are θ.
            rows: Which samples; all by default.
            size: Samples per chunk; `chunk` by default.
        """
        self.try_loss(network)
        size = size or self.chunk
        ratios = None if self.ratios is None else self.ratios[rows].split(size)
        chunks = zip(self.x[rows].split(size), self.y[rows].split(size), strict=True)
        return [
            self._part(network, x, y, None if ratios is None else ratios[i])
            for i, (x, y) in enumerate(chunks)
        ]

    def few(self, network: Network, n: int) -> Part:
        """The first n samples, as a part."""
        self.try_loss(network)
        ratios = None if self.ratios is None else self.ratios[:n]
        return self._part(network, self.x[:n], self.y[:n], ratios)

    def _part(self, network: Network, x: Tensor, y: Tensor, ratios: Tensor | None) -> Part:
        share = len(x) / self.n

        def outputs(theta: Tensor) -> Any:
            with network.at(theta):
                return given(self.loss, network(x))

        losses_of = partial(self.losses_of, y=y)

        def loss_of(o: Any) -> Tensor:
            if ratios is not None:  # the mean of a chunk is no mean of its samples' losses
                return losses_of(o).sum()
            if isinstance(o, Tensor) and o.dtype in HALF:  # which has three digits for a mean
                return losses_of(o).float().mean()
            try:
                return self.loss(o, y)
            except (RuntimeError, IndexError):
                losses_of(o)  # of a cross entropy, says what is wrong with the targets
                raise

        def both(theta: Tensor) -> tuple[Tensor, Any]:
            o = outputs(theta)
            return losses_of(o), o

        def traced(theta: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            o = separate(outputs(theta))
            leaves = [t for t in tree_leaves(o) if isinstance(t, Tensor) and t.requires_grad]
            return loss_of(o), losses_of(o), leaves

        def alone(theta: Tensor, i: Tensor) -> Tensor:
            with network.at(theta):
                # Not x[i]: under vmap of a gradient it asks for a number, and vmap gives up.
                one = i.view(1)
                o = given(self.loss, network(x.index_select(0, one)))
                return self.losses_of(o, y.index_select(0, one))[0]

        return Part(
            alone=alone,
            weight=share if ratios is None else 1 / self.n,
            share=share,
            samples=len(x),
            loss=lambda theta: loss_of(outputs(theta)),
            losses=lambda theta: losses_of(outputs(theta)),
            both=both,
            traced=traced,
            wrong=lambda o: None if self.leaves_out else misclassified(o, y),
            outputs=outputs if self.one_tensor else None,
            loss_of=loss_of,
            losses_of=losses_of,
        )

    def losses_of(self, outputs: Any, y: Tensor) -> Tensor:
        """ℓᵢ `(n,)` of some samples from their outputs: N sᵢ/W for the sums sᵢ of the loss."""
        assert self.how is not None
        sums = self.how.sums(outputs, y)
        return sums if self._mean_weight == 1 else sums / self._mean_weight

    def blocks(self, network: Network, size: int) -> Iterator[tuple[Part, int]]:
        """Parts of at most `size` samples, and the number of samples that all processes take."""
        parts = self.parts(network, size=min(size, self.chunk))
        return ((part, part.samples) for part in parts)

    def total(self, value: Tensor, n: int | None = None) -> Tensor:
        """The sum over n samples, of any shape, from this process's sum; n is all by default."""
        return value

    def gathered(self, values: Tensor, n: int | None = None) -> Tensor:
        """Values `(n, …)` of samples from those of this process; default all samples."""
        return values

"""A landscape whose samples are shared out to the ranks that `torchrun` started.

Every rank holds θ and all samples; what is shared out is the work on them and the graphs that it
keeps, which are far larger. A quantity is computed on the rank's own samples by the plain landscape
and then made whole: sums, by adding those of all ranks, each chunk weighted by its part of all N;
per-sample values, by adding vectors that are zero at the others' samples, so that order is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lsa.landscape.derivatives import budget
from lsa.landscape.derivatives.modes import Matvec
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.landscape import GRADIENTS, BatchGradient, Landscape
from lsa.runtime import ranks


def shared(landscape: Landscape) -> Landscape:
    """The landscape shared out to all ranks; itself in a process of its own."""
    if not ranks.meeting():
        return landscape
    memory = landscape._memory
    if memory is None and landscape.device.type == "cpu":  # which the ranks of a machine share
        memory = budget.free_memory() // (2 * int(os.environ["LOCAL_WORLD_SIZE"]))
    return Sharded(
        landscape.model,
        landscape.x,
        landscape.y,
        landscape.loss_function,
        chunk=landscape._chunk,
        memory=memory,
        layout=landscape.layout,
    )


class Sharded(Landscape):
    """A landscape on which each rank computes its share and every rank gets the whole.

    A split of fewer samples than ranks, and one on batch statistics, which cannot be divided, are
    computed in full by every rank.
    """

    _divisible = True

    @property
    def _divided(self) -> bool:
        return self._divisible and self.n_samples >= ranks.size()

    def _parts(self) -> Iterable[Part]:
        own = ranks.share(self.n_samples) if self._divided else slice(None)
        return self._samples().parts(self.network, own)

    def _total(self, part: Tensor) -> Tensor:
        """A sum over all samples from that over the rank's own."""
        return ranks.total(part.contiguous()) if self._divided else part

    def _gathered(self, values: Tensor) -> Tensor:
        """Values `(N, …)` of all samples from those of the rank's own."""
        if not self._divided:
            return values
        whole = values.new_zeros(self.n_samples, *values.shape[1:])
        whole[ranks.share(self.n_samples)] = values
        return ranks.total(whole)

    def _gathered_flags(self, flags: Tensor | None) -> Tensor | None:
        return None if flags is None else self._gathered(flags.to(torch.uint8)).bool()

    def _totalled(self, matvec: Matvec) -> Matvec:
        return lambda v: self._total(matvec(v))

    def on_batch_statistics(self) -> Landscape:
        """This landscape on the statistics of its samples together, which no rank can divide."""
        other = super().on_batch_statistics()
        if isinstance(other, Sharded) and other is not self:
            other._divisible = False
        return other

    # --- sums ------------------------------------------------------------------------------------

    def loss(self, theta: Tensor) -> float:
        """L(θ)."""
        return self._total(theta.new_tensor(super().loss(theta), dtype=torch.float64)).item()

    def loss_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """L(θ) and ∇L(θ) `(d,)` in one pass."""
        loss, gradient = super().loss_and_gradient(theta)
        both = torch.cat([theta.new_tensor([loss], dtype=torch.float64), gradient.double()])
        both = self._total(both)
        return both[0].item(), both[1:].to(theta.dtype)

    def batch_gradient(self) -> BatchGradient:
        """(θ, x, y) ↦ loss `()` and gradient `(d,)` on the mini-batch (x, y)."""
        alone = super().batch_gradient()

        def on(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            if not self._divisible or len(x) < ranks.size():
                return alone(theta, x, y)
            own = ranks.share(len(x))
            loss, gradient = alone(theta, x[own], y[own])
            both = ranks.total(torch.cat([loss[None], gradient.double()]) * len(x[own]) / len(x))
            return both[0], both[1:].to(theta.dtype)

        return on

    def hessian(self, theta: Tensor) -> Matvec:
        """v ↦ H(θ)v; `(d,)` or `(d, b)`."""
        return self._totalled(super().hessian(theta))

    def gauss_newton(self, theta: Tensor) -> Matvec:
        """v ↦ G(θ)v."""
        return self._totalled(super().gauss_newton(theta))

    def _moments(self, theta: Tensor) -> tuple[Matvec, Callable[[], Tensor]]:
        second_moment, mean = super()._moments(theta)
        return self._totalled(second_moment), lambda: self._total(mean())

    # --- per sample ------------------------------------------------------------------------------

    def per_sample(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of each sample, and whether a classifier takes it for another class."""
        losses, wrong = super().per_sample(theta)
        return self._gathered(losses), self._gathered_flags(wrong)

    def per_sample_along(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Losses, errors and slopes along u of each sample."""
        losses, wrong, slopes = super().per_sample_along(theta, u)
        return self._gathered(losses), self._gathered_flags(wrong), self._gathered(slopes)

    def curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample curvatures uᵀ∇²ℓᵢ(θ)u, `(N,)`."""
        return self._gathered(super().curvatures(theta, u))

    def gauss_newton_curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample (Jᵢu)ᵀ∇²ℓᵢ(Jᵢu), `(N,)`."""
        return self._gathered(super().gauss_newton_curvatures(theta, u))

    def sample_gradients(self, theta: Tensor) -> Iterator[Tensor]:
        """Per-sample gradients in blocks `(n, d)`, the rows of each computed by all ranks."""
        chunk = int(ranks.agreed(str(self.chunk)))  # of which each may have chosen its own
        size = min(ranks.size() * chunk, max(1, GRADIENTS // self.dimension))
        for rows in torch.arange(self.n_samples, device=self.x.device).split(size):
            block = self.subset(rows)
            if not (isinstance(block, Sharded) and block._divided):
                yield from Landscape.sample_gradients(block, theta)
                continue
            own = block.subset(torch.arange(len(rows), device=rows.device)[ranks.share(len(rows))])
            yield block._gathered(torch.cat(list(Landscape.sample_gradients(own, theta))))

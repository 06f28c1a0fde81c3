"""A landscape whose network is spread over processes: FSDP2 (`fully_shard`) and DDP.

Exact second derivatives do not go through either: `fully_shard` gives gradients without a graph,
and `autograd.grad` on it raises and spoils the next backward pass. So products are differences of
gradients, by `backward()` alone, and each process holds its part of θ and of every other vector.
Inner products are added over the processes in float64.

Traps that are taken care of (seen in torch 2.14):
- After a forward pass without gradients the root's parameters stay whole; changes of their shards
  are then ignored in silence. They are sharded again before every change.
- A step added and taken back leaves 6e-8: θ is copied in, not added to.
- Processes must make as many passes. One that has no batch left computes its first with weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lsa.landscape import noise_scale
from lsa.landscape.batches import moved, original
from lsa.landscape.derivatives.hessians import HessianProduct
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.network import evaluation
from lsa.landscape.noise_scale import NoiseScale
from lsa.landscape.terms import Objective, Terms
from lsa.maths.differences import Differences
from lsa.maths.spaces import LOCAL, Space
from lsa.maths.spectra import eigenpairs
from lsa.maths.spectra.eigenpairs import Extremes
from lsa.maths.spectra.quadrature import Quadrature, spectral_density
from lsa.runtime.errors import InputError


def _sum(part: Tensor) -> Tensor:
    """The sum over all processes; the same bits in each."""
    total = part.contiguous().clone()
    dist.all_reduce(total)
    return total


class ParallelLandscape:
    """L(θ) of a network that FSDP2 or DDP spreads over the processes of the default group.

    Every process makes it alike and calls the same methods. θ and all vectors are this process's
    part: with FSDP2 what it holds of each parameter, `(d/K,)`, with DDP all of it. Numbers are
    those of the whole, the same in every process.

    Args:
        model: After `fully_shard`, or wrapped in DistributedDataParallel. It is evaluated in
            `eval()` mode, and left as it was.
        batches: All batches, the same re-iterable in every process; process r computes batches r,
            r + K, …
        objective: `(model, batch) → lsa.Terms`.

    Raises:
        InputError: No process group, or parameters that are not sharded along one dimension each.
    """

    def __init__(self, model: nn.Module, batches: Any, objective: Objective) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("there is no process group; start with torchrun and set one up")
        self._model, self._batches, self._objective = model, batches, objective
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sharded = _sharded(model, self._parameters)
        if not self._sharded and not isinstance(model, DistributedDataParallel):
            raise InputError("the network is neither after fully_shard nor in DDP; wrap it")
        self.space = Space(_sum, self._rank, self._size) if self._sharded else LOCAL
        self.remarks: dict[str, str] = {}  # how products were computed, and their error
        self.theta = torch.cat([_local(p).detach().flatten() for p in self._parameters])
        self._weights = self._counted()

    @property
    def dimension(self) -> int:
        """Number d of parameters, of all processes."""
        return self.space.dimension(self.theta)

    # --- loss and gradient -----------------------------------------------------------------------

    def loss(self, theta: Tensor) -> float:
        """L(θ)."""
        total = torch.zeros((), dtype=torch.float64)
        with self._at(theta), torch.no_grad():
            for terms, share in self._terms(range(len(self._weights))):
                total += float(with_share(terms, share)) if share else 0.0
        return float(_sum(total))

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), this process's part."""
        return self._gradient(theta, range(len(self._weights)))

    def _gradient(self, theta: Tensor, chosen: range | list[int]) -> Tensor:
        total = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        with self._at(theta), torch.enable_grad():
            for terms, share in self._terms(chosen):
                # Both kinds of network average gradients over the processes.
                (with_share(terms, share) * self._size).backward()
                parts = [_gradient_of(p).flatten() for p in self._parameters]
                total += torch.cat(parts)
                self._forget()
        return total.to(theta.dtype)

    def _terms(self, chosen: range | list[int]) -> Iterator[tuple[Terms, float]]:
        """This process's of some batches, and their share 1/W of the loss: 0 beyond the last."""
        numbers = list(chosen)
        weight = sum(self._weights[i] for i in numbers)
        turns = -(-len(numbers) // self._size)
        own = numbers[self._rank :: self._size]
        wanted = dict.fromkeys(own or numbers[:1])
        contents = {i: b for i, b in enumerate(self._batches) if i in wanted}
        device = self.theta.device
        for _, number in zip_longest(range(turns), own):
            batch = moved(contents[next(iter(wanted)) if number is None else number], device)
            terms = self._objective(self._model, original(batch))
            yield terms, 0.0 if number is None else 1 / weight

    def _counted(self) -> list[float]:
        """Weights of all batches; each process asks its own."""
        n = sum(1 for _ in self._batches)
        weights = torch.zeros(n, dtype=torch.float64)
        self._weights = [1.0] * n
        with self._at(self.theta), torch.no_grad():
            for turn, (terms, share) in enumerate(self._terms(range(n))):
                if share:
                    weights[self._rank + turn * self._size] = float(terms.weight)
        return _sum(weights).tolist()

    # --- what is measured ------------------------------------------------------------------------

    def hessian(self, theta: Tensor) -> HessianProduct:
        """v ↦ H(θ)v by differences of gradients, with their error."""
        return HessianProduct(
            None,
            lambda: Differences(self.gradient, theta, name="Hv", space=self.space),
            "the network is spread over processes",
            lambda line: self.remarks.update(hessian=line),
        )

    def extremes(self, theta: Tensor, rng: torch.Generator, **options: Any) -> Extremes:
        """Both ends of the spectrum of H(θ).

        Args:
            theta: This process's part of θ.
            rng: Seeded alike in all processes.
            **options: Of `lsa.maths.spectra.eigenpairs.lanczos`.
        """
        start = eigenpairs.start_vector(theta, rng, self.gradient(theta), self.space)
        return eigenpairs.lanczos(self.hessian(theta), start, rng=rng, space=self.space, **options)

    def density(self, theta: Tensor, rng: torch.Generator, **options: Any) -> Quadrature:
        """The spectral density of H(θ).

        Args:
            theta: This process's part of θ.
            rng: Seeded alike in all processes.
            **options: Of `lsa.maths.spectra.quadrature.spectral_density`.
        """
        given = {"dtype": theta.dtype, "device": theta.device, "space": self.space}
        return spectral_density(self.hessian(theta), len(theta), rng=rng, **given, **options)

    def noise_scale(self, theta: Tensor, parts: int = noise_scale.PARTS) -> NoiseScale:
        """The gradient noise scale tr C/|G|² from batches of equal weight (McCandlish et al. 2018).

        Its unit is a unit of weight: tokens, where the objective counts tokens.

        Args:
            theta: This process's part of θ.
            parts: Batches whose gradients are compared, at most.

        Raises:
            InputError: Fewer than 3 batches, or of unequal weight.
        """
        n = len(self._weights)
        parts = min(parts, n)
        if parts < 3 or len(set(self._weights)) > 1:
            raise InputError(
                f"{n} batches of weights {min(self._weights):g} to {max(self._weights):g}; the "
                "noise scale needs 3 or more of equal weight"
            )
        gradients = torch.stack([self._gradient(theta, [i]) for i in range(parts)])
        gram = self.space.total(noise_scale.gram(gradients))
        size = int(self._weights[0])
        return noise_scale.of_gram(gram.cpu(), size, int(sum(self._weights)))

    def rise(self, theta: Tensor, radius: float) -> float:
        """L(θ + ρ g/|g|) − L(θ), the sharpness of one step of SAM (Foret et al. 2021, eq. 2)."""
        g = self.gradient(theta)
        step = g * (radius / float(self.space.length(g)))
        return self.loss(theta + step) - self.loss(theta)

    def directional_sharpness(self, theta: Tensor) -> float:
        """gᵀHg/|g|², the curvature along the gradient, at this process's part of θ `(d,)`."""
        g = self.gradient(theta)
        return self.space.dot(g, self.hessian(theta)(g)) / float(self.space.length(g)) ** 2

    # --- θ in and out ----------------------------------------------------------------------------

    @contextmanager
    def _at(self, theta: Tensor) -> Iterator[None]:
        """Within the block the network is at θ, in evaluation mode; afterwards as it was."""
        kept = [p.grad for p in self._parameters]
        self._put(theta)
        self._forget()
        try:
            with evaluation(self._model), full_float32(), torch.random.fork_rng([]):
                yield
        finally:
            self._put(self.theta)
            for p, gradient in zip(self._parameters, kept, strict=True):
                p.grad = gradient

    @torch.no_grad()
    def _put(self, theta: Tensor) -> None:
        self._reshard()
        own = [_local(p) for p in self._parameters]
        for part, values in zip(own, theta.split([p.numel() for p in own]), strict=True):
            part.copy_(values.view(part.shape))

    def _forget(self) -> None:
        self._reshard()
        for p in self._parameters:
            p.grad = None

    def _reshard(self) -> None:
        for module in self._model.modules():
            reshard: Callable[[], None] | None = getattr(module, "reshard", None)
            if self._sharded and reshard is not None:
                reshard()


def with_share(terms: Terms, share: float) -> Tensor:
    """The scalar that a batch adds to L; with a share of 0 its graph still holds every parameter.

    Raises:
        InputError: The share is not finite, since the weights of all batches sum to 0.
    """
    if not math.isfinite(share):
        raise InputError("the weights of all batches sum to 0; some must count")
    value = terms.total * share
    return value if terms.penalty is None else value + terms.penalty * (share * terms.weight)


def _local(p: Tensor) -> Tensor:
    """This process's part of a parameter."""
    to_local: Callable[[], Tensor] | None = getattr(p, "to_local", None)
    return p.detach() if to_local is None else to_local().detach()


def _gradient_of(p: Tensor) -> Tensor:
    return torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad)


def _sharded(model: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether `fully_shard` has split parameters over all processes; refuses what else splits them.

    Tensor parallelism may split every parameter along one dimension, too; but then all processes
    compute the same batch.
    """
    placed = [getattr(p, "placements", None) for p in parameters]
    if not parameters:
        raise InputError("the network has no trainable parameter; set requires_grad")
    if all(placement is None for placement in placed):
        return False
    sharding = [module for module in model.modules() if isinstance(module, FSDPModule)]
    known = {id(p) for module in sharding for p in module.parameters()}
    for p, placement in zip(parameters, placed, strict=True):
        split = placement is not None and len(placement) == 1 and placement[0].is_shard()
        if not split or id(p) not in known:
            raise InputError(
                "a parameter is not split along one dimension over all processes; FSDP2 and DDP "
                "are supported, tensor parallelism and hybrid sharding are not"
            )
    return True

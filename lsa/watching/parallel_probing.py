"""What is measured on a probe set after a step of a network that FSDP2 spreads over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.landscape import objectives
from lsa.landscape.parallel import ParallelLandscape
from lsa.landscape.terms import Objective
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError
from lsa.training import stability
from lsa.watching import probing, spectrum
from lsa.watching.evaluation import seeded, seen_in
from lsa.watching.probe_set import parts_of, refuse_max_norm
from lsa.watching.probing import Tried, numbers
from lsa.watching.profile import Derivatives, Profile, profile_of
from lsa.watching.undisturbed import undisturbed
from lsa.watching.weights import Weights

KINDS = ("update", "noise", "sharpness", "lambda_max")
# Optimizers that divide each number of the gradient by one of its own, so that each process
# knows its part of P.
ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
)  # fmt: skip


class ParallelProbing:
    """Like `Probing`, of `ParallelLandscape`: every process measures, with the same batches.

    Products are differences of gradients.

    Args:
        model: After `fully_shard`.
        weights: Of it, all that are trained.
        batches: The same in every process, as `lsa.watching.probe_set.read` gives them.
        loss: For pairs.
        objective: In place of it.
        kinds: Which of `KINDS`.
        optimizers: Of the training.

    Raises:
        InputError: Weights that `ParallelLandscape` refuses, or an unknown kind.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        batches: list[Any],
        loss: Loss | None,
        objective: Objective | None,
        kinds: Sequence[str],
        optimizers: Sequence[Optimizer],
    ) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise InputError(
                    f"measure={kind!r} is not measured on sharded weights; choose from "
                    f"{', '.join(KINDS)}"
                )
        if len(weights.parameters) < sum(p.requires_grad for p in model.parameters()):
            raise InputError(
                "the optimizers move some of the sharded weights only; leave out batches="
            )
        refuse_max_norm(model)
        self._batches = batches
        self._model, self._kinds = model, tuple(kinds)
        given = F.cross_entropy if loss is None else loss
        self._objective = seeded(objective or objectives.supervised(given))
        self._half: torch.dtype | None = None  # in which the network computes, if it does
        self._kinks = False  # whether it has some
        self._spectrum, self._optimizers = spectrum.Spectrum(), optimizers
        self._landscapes: list[ParallelLandscape] = []  # on the batches, and on equal parts

    @property
    def passes(self) -> int:
        """Forward passes that a first measurement is worth, at most."""
        return sum(probing.PASSES[kind] for kind in self._kinds)

    def ready(self) -> None:
        """Make the landscapes, once."""
        if not self._landscapes:
            with undisturbed(self._model, self._objective):
                for batches in (self._batches, parts_of(self._batches)):
                    self._landscapes.append(
                        ParallelLandscape(self._model, batches, self._objective)
                    )
                whole = self._landscapes[0]
                whole.loss(whole.theta)  # counts the samples, which is no part of L
                seen = seen_in(self._model, lambda: whole.loss(whole.theta))
                self._half, self._kinks = seen.half, seen.kinks

    def try_pass(self) -> None:
        """Make one forward pass."""
        with undisturbed(self._model, self._objective):
            landscape = self._now()[0]
            landscape.loss(landscape.theta)

    def _now(self) -> list[ParallelLandscape]:
        """The landscapes, whose θ is where the network is now."""
        theta = torch.cat(
            [p.detach().to_local().flatten() for p in self._model.parameters() if p.requires_grad]  # pyright: ignore
        )
        for landscape in self._landscapes:
            landscape.theta = theta
        return self._landscapes

    def measure(
        self, before: list[Tensor], tried: Tried, *, noise: bool = True
    ) -> dict[str, float]:
        """All numbers after a step, the same in every process.

        Args:
            before: This process's part of the parameters before the step.
            tried: Runs the work of each kind.
            noise: Whether the whole gradient's noise is measured here.
        """
        self.ready()
        with undisturbed(self._model, self._objective):
            landscape, parts = self._now()
            theta, space = landscape.theta, landscape.space
            start = torch.cat([p.reshape(-1).to(theta.dtype) for p in before])
            update = theta - start
            square = float(space.length(update)) ** 2

            def losses(at: Tensor) -> Tensor:
                return torch.tensor([landscape.loss(at)], dtype=torch.float64, device="cpu")

            point = spectrum.Point(
                landscape.hessian(theta), lambda: landscape.gradient(theta), update, space
            )
            work: dict[str, Callable[[], Mapping[str, float]]] = {
                "noise": lambda: parts.noise_scale(theta).numbers(),
                "lambda_max": lambda: self._spectrum.lambda_max(point),
                "sharpness": lambda: self._spectrum.sharpness(point, theta, self._state()),
            }

            def profiled() -> Profile:
                slope = math.nan
                if self._kinks:  # the curvature is left out
                    slope = float(space.dot(landscape.gradient(start), update))
                means = torch.tensor([[slope], [math.nan]], dtype=torch.float64, device="cpu")
                given = Derivatives(*means) if self._kinks else None
                return profile_of(losses, None, start, update, half=self._half, derivatives=given)

            if square > 0:
                work["update"] = lambda: profiled().numbers(square)
            if not math.isfinite(square):  # the training has diverged
                return {}
            return numbers(self._kinds, work, tried, noise=noise)

    def _state(self) -> stability.OptimizerState | None:
        """Of the optimizer that moves all weights."""
        if len(self._optimizers) > 1:
            return None
        (optimizer,) = self._optimizers
        if not isinstance(optimizer, ELEMENTWISE):
            raise InputError(
                f"the preconditioner of {type(optimizer).__name__} is not known from shards of "
                "its state; measure 'lambda_max'"
            )
        return stability.read(optimizer, [p for p in self._model.parameters() if p.requires_grad])

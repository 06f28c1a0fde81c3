"""What is measured on the probe set after a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lsa.landscape import Landscape
from lsa.maths import sums
from lsa.training import stability
from lsa.watching import spectrum
from lsa.watching.noise import Noise
from lsa.watching.probe_set import ProbeSet
from lsa.watching.profile import DERIVED, Profile, profile

USUAL = ("update", "noise")
KINDS = (*USUAL, "noise_of_blocks", "sharpness", "lambda_max", "batch_sharpness")

PASSES = {  # forward passes over the probe set that a first measurement is worth, at most
    "update": 11, "noise": 6, "noise_of_blocks": 6, "sharpness": 90, "lambda_max": 90,
    "batch_sharpness": 9,
}  # fmt: skip

Tried = Callable[[str, Callable[[], Mapping[str, float]]], Mapping[str, float] | None]
"""`(name, work) → numbers`, or None where the work has failed, now or before."""


def numbers(
    kinds: Sequence[str],
    work: Mapping[str, Callable[[], Mapping[str, float]]],
    tried: Tried,
    *,
    noise: bool,
) -> dict[str, float]:
    """Numbers of the kinds that have work, one kind after the other.

    Args:
        kinds: Of `KINDS`, in their order.
        work: Kind ↦ what measures it.
        tried: Runs the work of each kind.
        noise: Whether the whole gradient's noise is one of them.
    """
    measured: dict[str, float] = {}
    for kind in kinds:
        if kind in work and (noise or kind != "noise"):
            measured |= tried(kind, work[kind]) or {}
    return measured


class Probing:
    """Measurements on a probe set, one after the other at the same weights.

    Args:
        probe_set: Where L is known.
        optimizers: Of the training.
        kinds: Which of `KINDS`.
    """

    def __init__(
        self, probe_set: ProbeSet, optimizers: Sequence[Optimizer], kinds: Sequence[str] = USUAL
    ) -> None:
        self._probe_set, self._kinds = probe_set, tuple(kinds)
        self._optimizer = optimizers[0] if len(optimizers) == 1 else None
        self._spectrum = spectrum.Spectrum()
        blocks = "noise_of_blocks" in kinds
        self._kinds = tuple(k for k in self._kinds if not (blocks and k == "noise"))
        self._noise = Noise(probe_set.spans if blocks else {})
        self._profile: Profile | None = None

    @property
    def passes(self) -> int:
        """Forward passes that a first measurement is worth, at most."""
        derived = self._probe_set.half is not None or self._probe_set.kinks
        more = DERIVED if derived and "update" in self._kinds else 0
        return sum(PASSES[kind] for kind in self._kinds) + more

    def ready(self) -> None:
        """Prepare the probe set; its first passes take longer than later ones."""
        with self._probe_set.undisturbed():
            self._probe_set.ready()

    def try_pass(self) -> None:
        """Make one forward pass."""
        with self._probe_set.undisturbed():
            landscape = self._probe_set.landscape()
            landscape.losses(landscape.theta)

    def measure(
        self, before: list[Tensor], tried: Tried, *, noise: bool = True
    ) -> dict[str, float]:
        """All numbers after a step.

        Args:
            before: The parameters before the step.
            tried: Runs the work of each kind.
            noise: Whether the whole gradient's noise is measured here: it may be known otherwise.
        """
        probe_set = self._probe_set
        with probe_set.undisturbed():
            probe_set.ready()
            landscape = probe_set.landscape()
            theta = landscape.theta
            start = torch.cat([p.reshape(-1).to(theta.dtype) for p in before])
            update = theta - start
            square = float(sums.square(update))
            point = spectrum.Point(
                landscape.hessian(theta), lambda: landscape.gradient(theta), update
            )
            work: dict[str, Callable[[], Mapping[str, float]]] = {
                "noise": lambda: self._noise.measure(landscape, probe_set.parts(), theta),
                "lambda_max": lambda: self._spectrum.lambda_max(point),
                "sharpness": lambda: self._spectrum.sharpness(point, theta, self._state(landscape)),
                "batch_sharpness": lambda: spectrum.batch_sharpness(probe_set.given(), theta),
            }
            work["noise_of_blocks"] = work["noise"]
            if square > 0:
                work["update"] = lambda: self._profiled(landscape, start, update).numbers(square)
            if not math.isfinite(square):  # the training has diverged
                return {}
            return numbers(self._kinds, work, tried, noise=noise)

    def _profiled(self, landscape: Landscape, start: Tensor, update: Tensor) -> Profile:
        """The loss along the step, from where the last one was measured."""
        how = {"half": self._probe_set.half, "kinks": self._probe_set.kinks}
        self._profile = profile(landscape, start, update, self._profile, **how)
        return self._profile

    def _state(self, landscape: Landscape) -> stability.OptimizerState | None:
        """Of the optimizer that moves all of θ."""
        if self._optimizer is None:
            return None
        return stability.read(self._optimizer, landscape.own_parameters)

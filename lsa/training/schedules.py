"""Learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from pydantic import NonNegativeFloat

from lsa.project import factories
from lsa.runtime.errors import InputError


def schedule(
    name: str = "constant",
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    trusted: Collection[str] = (),
    **options: Any,
) -> Callable[[int], float]:
    """Multiplier of each group's learning rate as a pure function of the step, from 0.

    Args:
        name: `constant`; `cosine` (Loshchilov & Hutter 2017, eq. 5, without restarts) to the
            fraction `final=0.0` at the end; `step`, times `gamma=0.1` at each epoch in
            `milestones`; or `package.module:factory`, which returns the multiplier, a function of
            the step, from its options and those of `epochs` and `steps_per_epoch` that it names.
        epochs: Length of training.
        steps_per_epoch: Batches per epoch.
        warmup_epochs: Rise linearly from 0 over this many epochs first (Goyal et al. 2017, §2.2);
            the cosine then falls over what is left, milestones count from the start of training.
        trusted: Top-level packages whose factories may be imported.
        **options: `final`, or `milestones` and `gamma`.

    Raises:
        InputError: Unknown name or option, or a warm-up longer than training.
    """
    if name not in SCHEDULES and ":" not in name:
        hint = factories.nearest(name, SCHEDULES)
        raise InputError(
            f"unknown schedule {name!r}.{hint} Known are {', '.join(SCHEDULES)}, and "
            "package.module:factory."
        )
    given = {"warmup_epochs": warmup_epochs}
    checked = factories.check_options(f"schedule {name}", schedule, given, complete=False)
    warmup_epochs = checked["warmup_epochs"]
    if not 0 <= warmup_epochs <= epochs:
        raise InputError(
            f"warmup_epochs={warmup_epochs:g} is not within training; choose 0 to {epochs} epochs."
        )
    if ":" in name:
        length = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
        made = factories.make(f"schedule {name}", name, _Schedule, trusted, options, **length)
        warm_up = warmup_epochs * steps_per_epoch
        return lambda step: (min(1.0, (step + 1) / warm_up) if step < warm_up else 1.0) * made(step)
    shape = SCHEDULES[name]
    reserved = ("epoch", "start", "end")
    checked = factories.check_options(f"schedule {name}", shape, options, reserved)

    def multiplier(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < warmup_epochs:
            return min(1.0, (step + 1) / (warmup_epochs * steps_per_epoch))
        return shape(epoch, warmup_epochs, epochs, **checked)

    return multiplier


class _Schedule:
    """No class of lsa or torch is derived from it: a factory of a schedule needs trust."""


def _constant(epoch: float, start: float, end: float) -> float:
    return 1.0


def _cosine(epoch: float, start: float, end: float, final: NonNegativeFloat = 0.0) -> float:
    done = min(1.0, (epoch - start) / (end - start)) if end > start else 1.0
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def _step(
    epoch: float,
    start: float,
    end: float,
    milestones: tuple[NonNegativeFloat, ...],
    gamma: NonNegativeFloat = 0.1,
) -> float:
    return gamma ** sum(epoch >= milestone for milestone in milestones)


SCHEDULES = {"constant": _constant, "cosine": _cosine, "step": _step}

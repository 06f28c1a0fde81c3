"""`lsa.watch`: measurements inside a training loop, which stays as it is to the last bit."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lsa.landscape.terms import Objective
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError
from lsa.watching import hooks, probing
from lsa.watching.alarm import Alarm
from lsa.watching.budget import Budget
from lsa.watching.gradients import Gradients
from lsa.watching.losses import Losses
from lsa.watching.outputs import Outputs, Sink
from lsa.watching.own_noise import SAMPLES, OwnNoise
from lsa.watching.parallel_probing import ParallelProbing
from lsa.watching.probe_set import ProbeSet, read
from lsa.watching.watched import Inside, Plan, Watch
from lsa.watching.weights import Weights

LIMIT = 0.02  # of the training's time
EVERY = 100  # steps between measurements on the probe set

KINDS = (*probing.KINDS, SAMPLES)
WITHOUT_BATCHES = (SAMPLES, "noise_of_blocks")  # of the training's own gradients


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    objective: Objective | None = None,
    measure: Sequence[str] | None = None,
    every: int = EVERY,
    norms: int = 1,
    budget: float | None = LIMIT,
    scaler: Any = None,
    sees_loss: bool = True,
    step: int = 0,
    track: bool | str = True,
    log_every: int = 10,
    live: bool = False,
    alarm: int = 0,
    sink: Sink | None = None,
    strict: bool = False,
) -> Watch:
    """Watch a training from the inside, by the hooks of its own optimizer::

        with lsa.watch(model, optimizer) as watch:
            ...  # the training loop, as it is
        watch.history  # a DataFrame

    Measurements leave weights, buffers, attributes of modules, gradients and random states as they
    are. On several processes the first one measures and logs; all measure shards of weights.

    Args:
        model: That is trained; wrapped by DDP, FSDP or `torch.compile` or not.
        optimizer: Of torch or derived from it. Several are given in the order in which they step,
            and one step is then one of each.
        batches: A few fixed batches, on which the loss around the weights is measured: at most
            eight are read, once. Without them, only norms are measured.
        loss: `(outputs, targets) → scalar`, for batches that are pairs; default cross entropy. A
            loss that is a module also tells the training's own loss.
        objective: `(model, batch) → lsa.Terms`, one of `lsa.objectives` or of one's own, in place
            of `loss`.
        measure: What is measured on the batches: `update` and `noise` by default, `sharpness`,
            `lambda_max`, `batch_sharpness`, `noise_of_blocks` on request. `noise_of_samples` is the
            noise of the training's own batches, from its own passes, and needs no `batches`.
        every: Steps between these measurements.
        norms: Steps between measurements of norms and angles.
        budget: Share of the training's time that the watch may take; it measures less often where
            it would take more. None: no limit.
        scaler: With `get_scale()`, if it is no `GradScaler` of torch's, which is seen by itself.
        sees_loss: Whether outputs with a `.loss`, and what closures return, tell the training's own
            loss.
        step: Number of the last step that was made before, of a training that goes on.
        track: Log to MLflow: metrics `watch/…` at step = optimizer step, in the active run, which
            is not ended; a run is made where there is none. They are sent in the background. A run
            ID: in that run.
        log_every: Steps between those whose norms are logged; `history` has all.
        live: Show the newest numbers in one line, where there is a terminal.
        alarm: Measurements in a row in which steps go too far that raise an alarm; 0: none.
        sink: `(numbers, step)` instead of MLflow.
        strict: Raise what goes wrong in a measurement, in place of one line and no more of it.

    Raises:
        InputError: Options out of range, or an optimizer of other parameters.
    """
    optimizers = _optimizers(optimizer)
    _check(budget, norms=norms, every=every, log_every=log_every)
    _check_others(model, alarm=alarm, sink=sink, track=track, scaler=scaler)
    kinds = _kinds(measure, probed=batches is not None)
    probed = None if batches is None else read(batches)
    given = {"kinds": kinds, "batches": probed, "loss": loss, "objective": objective}
    return Watch(
        functools.partial(_inside, model, optimizers, scaler, **given),
        optimizers,
        losses=Losses(model, loss, seen=sees_loss),
        outputs=Outputs(sink, track=track, live=live, log_every=log_every, every=every),
        plan=Plan(norms, every, samples=SAMPLES in kinds),
        budget=Budget(budget),
        strict=strict,
        step=step,
        alarm=Alarm(alarm),
    )


def _inside(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    scaler: Any,
    *,
    kinds: Sequence[str],
    batches: list[Any] | None,
    **objective: Any,
) -> Inside:
    """What is watched of a network, as its optimizers move it now."""
    weights = Weights(model, optimizers)
    noise = OwnNoise(model, weights, blocks="noise_of_blocks" in kinds)
    probes: Any = None
    if batches is not None:
        probed = [kind for kind in kinds if kind != SAMPLES]
        if weights.sharded:
            given = {"kinds": probed, "optimizers": optimizers, **objective}
            probes = ParallelProbing(model, weights, batches, **given)
        else:
            probe_set = ProbeSet(model, weights, batches, **objective)
            probes = probing.Probing(probe_set, optimizers, probed)
    return Inside(weights, Gradients(weights, scaler, noise), probes)


def _kinds(measure: Sequence[str] | None, *, probed: bool) -> Sequence[str]:
    """What is measured beside norms."""
    if isinstance(measure, str):
        raise InputError(f"measure={measure!r} is no list; write [{measure!r}]")
    for kind in measure or ():
        if kind not in KINDS:
            raise InputError(f"measure={kind!r} is unknown; choose from {', '.join(KINDS)}")
        if not probed and kind not in WITHOUT_BATCHES:
            raise InputError(
                f"measure={kind!r} needs batches=, a few batches on which the loss is measured; "
                f"without them choose from {', '.join(WITHOUT_BATCHES)}"
            )
    return (probing.USUAL if probed else ()) if measure is None else measure


def _check(budget: float | None, **intervals: int) -> None:
    """Refuse options out of range."""
    for name, steps in intervals.items():
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"{name}={steps!r} is no number of steps; choose 1 or more")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget={budget} is no share of time; choose one above 0, up to 1")


def _check_others(model: Any, *, alarm: Any, sink: Any, track: Any, scaler: Any) -> None:
    """Refuse what is of no use as such."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(alarm, int) or alarm < 0:
        raise InputError(f"alarm={alarm!r} is no number of measurements; choose 0 for none, or 2")
    if sink is not None and not callable(sink):
        raise InputError(f"sink={sink!r} cannot be called; give a function (numbers, step)")
    if not isinstance(track, bool | str):
        raise InputError(f"track={track!r} is neither True nor False nor a run's ID")
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise InputError(f"scaler={scaler!r} has no get_scale(); leave it out or give a GradScaler")


def _optimizers(given: Any) -> list[Optimizer]:
    """The optimizers inside of what was given."""
    listed = given if isinstance(given, Sequence) else [given]
    if not listed:
        raise InputError("there is no optimizer; give the one that trains the model")
    optimizers = [hooks.inner_optimizer(optimizer) for optimizer in listed]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise InputError(
                f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer; give the "
                "optimizer that trains the model"
            )
    return optimizers

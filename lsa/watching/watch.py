"""`lsa.watch`: measurements inside a training loop, which stays as it is to the last bit."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.landscape.terms import Objective
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError, one_line
from lsa.watching import hooks, probing
from lsa.watching import norms as norms_
from lsa.watching.alarm import Alarm
from lsa.watching.budget import Budget
from lsa.watching.gradients import Gradients
from lsa.watching.history import History
from lsa.watching.losses import Losses
from lsa.watching.outputs import Outputs, Sink
from lsa.watching.own_noise import OwnNoise
from lsa.watching.parallel_probing import ParallelProbing
from lsa.watching.probe_set import ProbeSet
from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")
LIMIT = 0.02  # of the training's time
EVERY = 100  # steps between measurements on the probe set

Probes = probing.Probing | ParallelProbing
Row = dict[str, float]
T = TypeVar("T")


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    objective: Objective | None = None,
    measure: Sequence[str] = probing.USUAL,
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

    Measurements leave weights, buffers, gradients and random states as they are. On several
    processes the first one measures and logs; shards of weights are measured by all.

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
        measure: What is measured on the batches: `update`, `noise`, `sharpness`, `batch_sharpness`.
        every: Steps between these measurements.
        norms: Steps between measurements of norms and angles.
        budget: Share of the training's time that the watch may take; it measures less often where
            it would take more. None: no limit.
        scaler: The `GradScaler`, if there is one: the gradient's norm before clipping needs it.
        sees_loss: Whether outputs with a `.loss` tell the training's own loss.
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
    weights = Weights(model, optimizers)
    probes = None
    if batches is not None:
        given = {"loss": loss, "objective": objective}
        probes = _probes(model, weights, optimizers, batches, measure, **given)
    return Watch(
        weights,
        optimizers,
        losses=Losses(model if sees_loss else None, loss),
        probes=probes,
        gradients=Gradients(weights, scaler, OwnNoise(model, weights)),
        outputs=Outputs(sink, track=track, live=live, log_every=log_every, every=every),
        every={"norms": norms, "probes": every},
        budget=Budget(budget),
        strict=strict,
        step=step,
        alarm=Alarm(alarm),
    )


def _probes(
    model: nn.Module,
    weights: Weights,
    optimizers: Sequence[Optimizer],
    batches: Iterable[Any],
    measure: Sequence[str],
    **objective: Any,
) -> Probes:
    """What is measured on the batches, in this process or in all that hold shards."""
    if weights.sharded:
        return ParallelProbing(model, weights, batches, kinds=measure, **objective)
    return probing.Probing(ProbeSet(model, weights, batches, **objective), optimizers, measure)


def _check(budget: float | None, **intervals: int) -> None:
    """Refuse options out of range."""
    for name, steps in intervals.items():
        if steps < 1:
            raise InputError(f"{name}={steps} is no number of steps; choose 1 or more")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget={budget} is no share of time; choose one above 0, up to 1")


def _optimizers(given: Any) -> list[Optimizer]:
    """The optimizers inside of what was given."""
    found = [hooks.inner_optimizer(o) for o in (given if isinstance(given, Sequence) else [given])]
    for one in found:
        if not isinstance(one, Optimizer):
            raise InputError(
                f"optimizer is a {type(one).__name__}, not a torch.optim.Optimizer; give the "
                "optimizer that trains the model"
            )
    return found


class Watch:
    """A training that is watched; `lsa.watch` makes it.

    Attributes:
        step: Number of the last optimizer step.
    """

    def __init__(
        self,
        weights: Weights,
        optimizers: Sequence[Optimizer],
        *,
        losses: Losses,
        gradients: Gradients,
        probes: Probes | None,
        outputs: Outputs,
        every: Mapping[str, int],
        budget: Budget,
        strict: bool,
        step: int,
        alarm: Alarm,
    ) -> None:
        self.step = step
        self._weights, self._optimizers = weights, list(optimizers)
        self._losses, self._gradients, self._probes = losses, gradients, probes
        self._every, self._budget, self._strict = every, budget, strict
        self._history, self._outputs, self._alarm = History(), outputs, alarm
        self._norms = norms_.Norms(weights)
        self._next_norms = step + 1
        self._probing = self._trying = False  # after the step at hand; a trial alone
        self._off: set[str] = set()  # parts that have failed
        self._handles: list[Any] = []
        self._open = True
        if weights.leads or weights.sharded:
            self._handles = [
                *hooks.attach(self._optimizers, self),
                *gradients.attach(
                    self._norms_are_due, lambda work: self._run("norms", work, whole=False)
                ),
                *losses.attach(lambda work: self._run("loss", work, whole=False)),
            ]
        if weights.leads:
            self._run("logging", outputs.open, whole=False)
            atexit.register(self.close)

    # --- what the hooks tell ---------------------------------------------------------------------

    def begins(self) -> None:
        """The first optimizer is about to step."""
        step = self.step + 1
        due = self._probes is not None and step % self._every["probes"] == 0
        self._probing = due and not self._off & {"norms", "probes"}
        if self._probing:
            allowed, unknown = self._budget.allows("probes"), self._budget.unknown("probes")
            choice = self._weights.agreed(allowed + 2 * unknown)  # processes measure together
            self._probing, self._trying = bool(choice % 2), choice >= 2
        if self._probing:  # with all that belongs to the step
            self._next_norms = min(self._next_norms, step)
        if self._probing or step in (self._next_norms - 1, self._next_norms):
            self._run("norms", lambda: self._norms.before(step), whole=False)

    def has_gradients(self, optimizer: Optimizer, loss: Any) -> None:
        """An optimizer has its gradients."""
        self._losses.add(loss)
        if self._norms_are_due():
            take = self._gradients.take
            self._run("norms", lambda: take(optimizer, kept=loss is not None), whole=False)

    def ends(self) -> None:
        """The last optimizer has stepped."""
        self.step += 1
        self._budget.stepped()
        row: Row = {}
        if self._probing or self.step == self._next_norms:
            self._weights.wait()
        before = self._run("norms", self._start, whole=False) if self._probing else None
        if self.step == self._next_norms:
            row |= self._run("norms", self._measure_norms) or {}
            self._next_norms += self._weights.agreed(self._interval())
        if before is not None and self._trying:
            self._try_probes()
        elif before is not None:
            row |= self._run("probes", lambda: self._measure_probes(before)) or {}
        self._losses.forget()
        if row and self._weights.leads:
            self._run("logging", lambda: self._record(row), whole=False)

    def loss(self, value: Any) -> None:
        """Tell the training's loss, where no hook sees it: a plain function in a plain loop."""
        self._losses.add(value)

    def _norms_are_due(self) -> bool:
        return self.step + 1 == self._next_norms and "norms" not in self._off

    def _interval(self) -> int:
        """Steps to the next measurement of norms, which take half of the budget beside others."""
        share = 1.0 if self._probes is None else 0.5
        return self._budget.interval("norms", self._every["norms"], share)

    def _start(self) -> list[Tensor]:
        """A copy of θ before the step."""
        return [p.clone() for p in self._norms.start]

    def _measure_norms(self) -> Row:
        blocks = self._outputs.blocks_are_due(self.step)
        products = self._norms.after(self.step, self._gradients.given(), each=blocks)
        row: Row = {"learning_rate": float(self._optimizers[0].param_groups[0]["lr"])}
        loss = self._losses.mean()
        if loss is not None:
            row["loss"] = loss.item()
        row |= norms_.numbers(products.sum(1).tolist())
        before = self._gradients.norm_before_clipping(row["gradient_norm"])
        if before is not None:
            row["gradient_norm_unclipped"] = before
        row |= self._gradients.noise_numbers()
        if blocks:
            for block, values in self._weights.by_block(products).items():
                numbers = norms_.numbers(values.tolist())
                row |= {f"{n}/{block}": numbers[n] for n in norms_.NAMES if n in numbers}
        self._gradients.forget()
        return row

    def _measure_probes(self, before: list[Tensor]) -> Row:
        assert self._probes is not None
        self._losses.silent = True
        try:
            return self._probes.measure(before, self._run, noise=not self._gradients.noise.known)
        finally:
            self._losses.silent = False

    def _try_probes(self) -> None:
        """See what a pass over the probe set takes."""
        probes = self._probes
        assert probes is not None
        self._losses.silent = True
        self._run("probes", probes.ready, whole=False)
        self._run("trial of probes", probes.try_one)
        self._losses.silent = False
        if "trial of probes" not in self._off:
            self._budget.expect("probes", probes.passes)

    # --- what becomes of it ----------------------------------------------------------------------

    def _record(self, row: Row) -> None:
        row = {**row, "overhead": self._budget.overhead}
        if self._alarm.sees(self.step, row):
            row["alarm"] = 1.0
            log.warning("watch: steps go too far at step %d; the loss may rise soon", self.step)
        self._history.add(self.step, row)
        self._outputs.put(self.step, row)

    def _run(self, part: str, work: Callable[[], T], *, whole: bool = True) -> T | None:
        """Work for a part: timed, and switched off for good where it fails."""
        if part in self._off:
            return None
        try:
            with self._budget.timed(part, whole=whole):
                return work()
        except Exception as error:
            if self._strict:
                raise
            self._off.add(part)
            log.warning("watch: %s is off from step %d on: %s", part, self.step, one_line(error))
            return None

    @property
    def history(self) -> Any:
        """All that was measured as a pandas DataFrame, one row a step."""
        return self._history.frame()

    @property
    def rows(self) -> list[Row]:
        """The same as mappings, each with what was measured at its step."""
        return self._history.rows()

    @property
    def alarms(self) -> list[int]:
        """Steps at which an alarm was raised."""
        return self._alarm.steps

    def figure(self) -> Any:
        """What was measured over the steps, as a matplotlib figure."""
        from lsa.figures.watch import draw

        return draw(self._history.column, f"{self.step} steps of training", self.alarms)

    def close(self, status: str = "FINISHED") -> None:
        """Take the hooks off, log the history and a figure, and send the rest.

        Args:
            status: That a run is ended with if it was made here.
        """
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        for handle in self._handles:
            handle.remove()
        if self._weights.leads and "logging" not in self._off:
            self._run("logging", lambda: self._outputs.close(self._history, status))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

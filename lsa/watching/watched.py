"""A training that is watched: what its hooks tell, when something is measured, where it goes."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lsa.runtime.errors import brief
from lsa.watching import hooks, opened
from lsa.watching import norms as norms_
from lsa.watching.alarm import Alarm
from lsa.watching.budget import Budget
from lsa.watching.gradients import Gradients
from lsa.watching.history import History
from lsa.watching.losses import Losses
from lsa.watching.outputs import SENDING, Outputs
from lsa.watching.own_noise import SAMPLES
from lsa.watching.parallel_probing import ParallelProbing
from lsa.watching.parts import Parts
from lsa.watching.probing import Probing
from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")

Row = dict[str, float]
T = TypeVar("T")


class Inside(NamedTuple):
    """What is known of the network, as long as the optimizers move the same parameters."""

    weights: Weights
    gradients: Gradients
    probes: Probing | ParallelProbing | None


class Plan(NamedTuple):
    """When something is measured, as far as the budget allows."""

    norms: int  # steps between norms
    every: int  # steps between measurements on the probe set, and of single samples
    samples: bool  # whether single samples are measured


def _counted(method: Callable[..., None]) -> Callable[..., None]:
    """A method whose whole time is the watch's."""

    @functools.wraps(method)
    def call(self: Watch, *args: Any, **kwargs: Any) -> None:
        with self._budget.counted():
            method(self, *args, **kwargs)

    return call


class Watch:
    """A training that is watched; `lsa.watch` makes it.

    Attributes:
        step: Number of the last optimizer step.
        is_open: Whether it measures; a copy never does, but has what was measured.
    """

    def __init__(
        self,
        inside: Callable[[], Inside],
        optimizers: Sequence[Optimizer],
        *,
        losses: Losses,
        outputs: Outputs,
        plan: Plan,
        budget: Budget,
        strict: bool,
        step: int,
        alarm: Alarm,
    ) -> None:
        self.step = self._first = step
        self._optimizers, self._losses = list(optimizers), losses
        self._plan, self._budget, self._parts = plan, budget, Parts(budget, strict=strict)
        self._history, self._outputs, self._alarm = History(), outputs, alarm
        self._at = self._next_norms = step + 1  # the step at hand; the next one with norms
        self._probing = self._trying = False  # after the step at hand; a trial alone
        self._sampling = False  # single samples in the step at hand
        self._awake, self._wakes = True, self._at  # in the step at hand; the next step with work
        self._begun = 0  # times that the first optimizer has begun in the step at hand
        self._repeats = 0  # steps in a row in which it began more than once; -1: that was said
        self._handles: list[Any] = []
        self._inner: list[Any] = []  # handles of what a change of the parameters makes anew
        self.is_open = True
        self._inside = inside
        self._look_inside()
        opened.close_before(self._weights, self._optimizers)
        if self._sees:
            self._handles = [
                *hooks.attach(self._optimizers, self),
                *losses.attach(self._may_be_due, lambda work: self._run("loss", work, ends=False)),
            ]
            self._plan_samples()
        if self._weights.leads:
            self._run("logging", lambda: outputs.open(budget), ends=False)
            self._lost = weakref.finalize(self, _send_rest, outputs, self._history)
            self._lost.atexit = False
        opened.add(self)
        if self._weights.outside and self._weights.leads:
            log.warning(
                "watch: %d of the parameters that the optimizers move are not in the model and so "
                "in no number; give a module that holds all of them",
                self._weights.outside,
            )

    @property
    def _sees(self) -> bool:
        """Whether this process measures."""
        return self._weights.leads or self._weights.sharded

    def _look_inside(self) -> None:
        """Take the network's parameters as they are now."""
        for handle in self._inner:
            handle.remove()
        self._weights, self._gradients, self._probes = self._inside()
        self._norms = norms_.Norms(self._weights)
        if self._sees:
            self._inner = self._gradients.attach(
                self._norms_are_due,
                lambda part, work: self._run(part, work, ends=False),
                self._samples_are_due if self._plan.samples else None,
                self._interrupted,
            )
            self._gradients.listen(self._norms_are_due())

    # --- what the hooks tell ---------------------------------------------------------------------

    def begins(self) -> bool:
        """The first optimizer is about to step; whether there is work in this step."""
        self._begun += 1
        self._awake = self.step + 1 >= self._wakes
        if self._awake:
            self._begin()
        return self._awake

    @_counted
    def _begin(self) -> None:
        step = self._at = self.step + 1
        if self._gradients.closed:
            self._begin_anew()
        self._next_norms = max(self._next_norms, step)  # a measurement may have been interrupted
        due = self._probes is not None and step % self._plan.every == 0
        self._probing = due and self._parts.are_on("norms", "probes")
        if self._probing:
            allowed, unknown = self._budget.allows("probes"), self._budget.unknown("probes")
            choice = self._weights.agreed(allowed + 2 * unknown)  # processes measure together
            self._probing, self._trying = bool(choice % 2), choice >= 2
        if self._probing:  # with all that belongs to the step
            self._next_norms = min(self._next_norms, step)
        if self._probing or step in (self._next_norms - 1, self._next_norms):
            if self._weights.have_changed(self._optimizers, inside=self._probing):
                self._run("norms", self._look_inside, ends=False)
            self._run("norms", lambda: self._norms.before(step), ends=False)

    def _interrupted(self, optimizer: Optimizer) -> None:
        """A pass begins after an optimizer has taken the last gradients of the step."""
        if optimizer is self._optimizers[-1]:
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget what belongs to a step that has raised: another batch may take its place."""
        self._gradients.forget()
        self._losses.forget()

    @_counted
    def has_gradients(self, optimizer: Optimizer, loss: Any, *, closure: bool) -> None:
        """An optimizer has its gradients."""
        self._losses.returned(loss)
        if len(self._optimizers) == 1:
            self._losses.complete()
        if self._norms_are_due():
            take = functools.partial(self._gradients.take, optimizer, closure=closure)
            # What one optimizer was given may be gone when the next one steps.
            kept = closure or len(self._optimizers) > 1
            self._run("norms", lambda: take(kept=kept), ends=False)

    def ends(self) -> None:
        """The last optimizer has stepped."""
        self.step += 1
        self._count()
        if self._awake:
            self._end()

    def _count(self) -> None:
        """See whether the first optimizer steps as often as the last, as in most steps it does.

        A GradScaler leaves out single steps of one of them.
        """
        begun, self._begun = self._begun, 0
        if self._repeats >= 0:
            self._repeats = self._repeats + 1 if begun > 1 else 0
        if self._repeats > 1:
            self._repeats = -1
            if self._weights.leads:
                log.warning(
                    "watch: the first optimizer makes %d steps for one of the last, and norms are "
                    "those of its last one; give each optimizer a watch of its own",
                    begun,
                )

    @_counted
    def _end(self) -> None:
        self._budget.has_made(self.step - self._first)
        row: Row = {}
        if self._probing or self.step == self._next_norms:
            self._weights.wait()
        before = self._run("norms", self._start, ends=False) if self._probing else None
        if self.step == self._next_norms:
            row |= self._run("norms", self._measure_norms) or {}
            self._next_norms += self._weights.agreed(self._interval())
        elif self.step == self._next_norms - 1:
            self._run("norms", lambda: self._norms.ends(self.step), ends=False)
        self._plan_samples()
        self._gradients.listen(self._norms_are_due())
        if before is not None and self._trying:
            self._try_probes()
        elif before is not None:
            row |= self._run("probes", lambda: self._measure_probes(before)) or {}
        self._losses.forget()
        if row and self._weights.leads:
            self._run("logging", lambda: self._record(row), ends=False)
        self._at = self.step + 1
        self._wakes = self._next_work()

    def _next_work(self) -> int:
        """The next step with work: the one before a measurement prepares it."""
        due = self._next_norms
        if self._probes is not None or self._plan.samples:
            due = min(due, (self.step // self._plan.every + 1) * self._plan.every)
        return due - 1

    def loss(self, value: Any) -> None:
        """Tell the training's loss, where no hook sees it: a plain function in a plain loop."""
        if self.is_open and self._may_be_due():
            self._losses.add(value)

    def batch(self, batch: Any) -> None:
        """Tell the batch of a pass, where calls of the model do not say that one begins.

        The callback of Lightning does: `training_step` calls the module's parts, or all of it.
        """
        if self.is_open and self._norms_are_due():
            self._run("norms", lambda: self._gradients.noise.tell(batch), ends=False)

    def _norms_are_due(self) -> bool:
        return self.step + 1 == self._next_norms and self._parts.are_on("norms")

    def _may_be_due(self) -> bool:
        """Whether the step at hand may be measured; on the probe set as the budget then is."""
        probed = self._probes is not None and (self.step + 1) % self._plan.every == 0
        return probed or self._norms_are_due()

    def _samples_are_due(self) -> bool:
        return self._sampling and self._norms_are_due()

    def _plan_samples(self) -> None:
        """See whether single samples are measured in the step that comes."""
        step = self.step + 1
        due = self._plan.samples and step % self._plan.every == 0
        self._sampling = due and self._parts.are_on(SAMPLES) and self._budget.allows(SAMPLES)
        if self._sampling:
            self._next_norms = step

    def _interval(self) -> int:
        """Steps to the next measurement of norms: they have what others leave of the budget."""
        others = 0.1 if self._probes is None else 0.5
        others += SENDING if self._outputs.sends and self._probes is None else 0.0
        return self._budget.interval("norms", self._plan.norms, 1 - others)

    def _start(self) -> list[Tensor]:
        """A copy of θ before the step."""
        return [p.clone() for p in self._norms.start]

    def _measure_norms(self) -> Row:
        blocks = self._outputs.blocks_are_due(self.step)
        products = self._norms.after(self.step, self._gradients.given(), each=blocks)
        rate = self._optimizers[0].param_groups[0].get("lr")
        row: Row = {} if rate is None else {"learning_rate": float(rate)}
        noise = self._gradients.noise
        loss = self._losses.mean(noise.passes, noise.dropped)
        if loss is not None:
            row["loss"] = loss.item()
        row |= norms_.numbers(products.sum(1).tolist())
        before = self._gradients.norm_before_clipping(row["gradient_norm"])
        if before is not None:
            row["gradient_norm_unclipped"] = before
        part = SAMPLES if self._sampling else "noise of passes"
        row |= self._run(part, self._gradients.noise_numbers) or {}
        if blocks:
            for block, values in self._weights.by_block(products).items():
                numbers = norms_.numbers(values.tolist())
                row |= {f"{n}/{block}": numbers[n] for n in norms_.NAMES if n in numbers}
        self._gradients.forget()
        return row

    def _measure_probes(self, before: list[Tensor]) -> Row:
        assert self._probes is not None
        return self._probes.measure(before, self._run, noise=not self._gradients.noise.known)

    def _try_probes(self) -> None:
        """See what a pass over the probe set takes."""
        probes = self._probes
        assert probes is not None
        self._run("probes", probes.ready, ends=False)
        self._run("trial of probes", probes.try_pass)
        if self._parts.are_on("trial of probes"):
            self._budget.expect("probes", probes.passes)

    # --- what becomes of it ----------------------------------------------------------------------

    def _record(self, row: Row) -> None:
        row = {**row, "overhead": self._budget.overhead}
        if self._alarm.sees(self.step, row):
            row["alarm"] = 1.0
            log.warning("watch: steps go too far at step %d; the loss may rise soon", self.step)
        self._history.add(self.step, row)
        self._outputs.put(self.step, row)

    def _run(self, part: str, work: Callable[[], T], *, ends: bool = True) -> T | None:
        return self._parts.run(part, self._at, work, ends=ends)

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
        if not self.is_open:
            return
        self.is_open = False
        opened.remove(self)
        for handle in [*self._handles, *self._inner]:
            handle.remove()
        if self._weights.leads:
            if self.step == self._first and self._gradients.noise.passes and status == "FINISHED":
                log.warning(
                    "watch: backward passes and no step of the optimizer were seen; methods other "
                    "than step() call no hooks, so give the optimizer whose step() is called"
                )
            self._lost.detach()
            self._run("logging", lambda: self._outputs.close(self._history, status))

    def watches(self, weights: Weights, optimizers: Sequence[Optimizer]) -> bool:
        """Whether it is of the same training: an optimizer of it, or all that it moves."""
        same = any(own is other for own in self._optimizers for other in optimizers)
        return same or {*map(id, self._weights.parameters)} == {*map(id, weights.parameters)}

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: a watch that is closed, with what was measured."""
        return {
            "step": self.step,
            "_history": self._history,
            "_alarm": self._alarm,
            "is_open": False,
        }

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close("FINISHED" if kind is None else "FAILED")


def _send_rest(outputs: Outputs, history: History) -> None:
    """Send the rest of a watch whose training is gone, as when a function that trained has ended.

    A thread does, for Python lets go of things in the middle of anything else.
    """
    threading.Thread(target=lambda: _quietly(outputs, history), name="lsa-watch-end").start()


def _quietly(outputs: Outputs, history: History) -> None:
    try:
        outputs.close(history, "FINISHED")
    except Exception as error:
        log.warning("watch: the history is not logged: %s", brief(error))

"""`lsa.watch`: measurements inside a training loop, which stays as it is to the last bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.landscape.terms import Objective
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError, one_line
from lsa.watching import hooks, probing
from lsa.watching import norms as norms_
from lsa.watching.budget import Budget
from lsa.watching.gradients import Gradients
from lsa.watching.losses import Losses
from lsa.watching.probe_set import ProbeSet
from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")
LIMIT = 0.02  # of the training's time
EVERY = 100  # steps between measurements on the probe set

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
    strict: bool = False,
) -> Watch:
    """Watch a training from the inside, by the hooks of its own optimizer.

        with lsa.watch(model, optimizer) as watch:
            ...  # the training loop, as it is
        watch.history  # a DataFrame

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
        strict: Raise what goes wrong in a measurement, in place of one line and no more of it.

    Raises:
        InputError: Options out of range, or an optimizer of other parameters.
    """
    given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [hooks.inner_optimizer(one) for one in given]
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise InputError(
                f"optimizer is a {type(one).__name__}, not a torch.optim.Optimizer; give the "
                "optimizer that trains the model"
            )
    for name, steps in (("norms", norms), ("every", every)):
        if steps < 1:
            raise InputError(f"{name}={steps} is no number of steps; choose 1 or more")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget={budget} is no share of time; choose one above 0, up to 1")
    weights = Weights(model, optimizers)
    probes = None
    if batches is not None:
        probe_set = ProbeSet(model, weights, batches, loss, objective)
        probes = probing.Probing(probe_set, optimizers, measure)
    return Watch(
        weights,
        optimizers,
        losses=Losses(model, loss),
        probes=probes,
        gradients=Gradients(weights, scaler),
        every={"norms": norms, "probes": every},
        budget=Budget(budget),
        strict=strict,
    )


class Watch:
    """A training that is watched; `lsa.watch` makes it.

    Attributes:
        step: Number of the last optimizer step.
        rows: What was measured, one mapping a step.
    """

    def __init__(
        self,
        weights: Weights,
        optimizers: Sequence[Optimizer],
        *,
        losses: Losses,
        gradients: Gradients,
        probes: probing.Probing | None,
        every: Mapping[str, int],
        budget: Budget,
        strict: bool,
    ) -> None:
        self.step = 0
        self.rows: list[Row] = []
        self._weights, self._optimizers = weights, list(optimizers)
        self._losses, self._gradients, self._probes = losses, gradients, probes
        self._every, self._budget, self._strict = every, budget, strict
        self._norms = norms_.Norms(weights)
        self._next_norms = 1
        self._probing = False  # after the step at hand
        self._off: set[str] = set()  # parts that have failed
        self._handles: list[Any] = []
        leads = not dist.is_initialized() or dist.get_rank() == 0
        if leads or weights.sharded:
            self._handles = [
                *hooks.attach(self._optimizers, self),
                *gradients.attach(self._norms_are_due),
                *losses.attach(),
            ]

    # --- what the hooks tell ---------------------------------------------------------------------

    def begins(self) -> None:
        """The first optimizer is about to step."""
        step = self.step + 1
        due = self._probes is not None and step % self._every["probes"] == 0
        self._probing = due and self._budget.allows("probes")
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
        before = [p.clone() for p in self._norms.start] if self._probing else []
        if self.step == self._next_norms:
            row |= self._run("norms", self._measure_norms) or {}
            share = 1.0 if self._probes is None else 0.5
            self._next_norms += self._budget.interval("norms", self._every["norms"], share)
        if before:
            row |= self._run("probes", lambda: self._measure_probes(before)) or {}
        self._losses.forget()
        if row:
            self._record(row)

    def _norms_are_due(self) -> bool:
        return self.step + 1 == self._next_norms and "norms" not in self._off

    def _measure_norms(self) -> Row:
        products = self._norms.after(self.step, self._gradients.given())
        row: Row = {"learning_rate": float(self._optimizers[0].param_groups[0]["lr"])}
        loss = self._losses.mean()
        if loss is not None:
            row["loss"] = loss.item()
        row |= norms_.numbers(products.sum(1).tolist())
        before = self._gradients.norm_before_clipping(row["gradient_norm"])
        if before is not None:
            row["gradient_norm_unclipped"] = before
        for block, values in self._weights.by_block(products).items():
            numbers = norms_.numbers(values.tolist())
            row |= {f"{n}/{block}": numbers[n] for n in norms_.NAMES if n in numbers}
        self._gradients.forget()
        return row

    def _measure_probes(self, before: list[Tensor]) -> Row:
        assert self._probes is not None
        self._losses.silent = True
        try:
            return self._probes.measure(before, self._run)
        finally:
            self._losses.silent = False

    # --- what becomes of it ----------------------------------------------------------------------

    def _record(self, row: Row) -> None:
        self.rows.append({"step": self.step, **row, "overhead": self._budget.overhead})

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
        import pandas

        return pandas.DataFrame(self.rows)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

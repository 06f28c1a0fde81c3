"""`lsa.watch`: measurements inside a training loop, which stays as it is to the last bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lsa.runtime.errors import InputError, one_line
from lsa.watching import hooks
from lsa.watching import norms as norms_
from lsa.watching.budget import Budget
from lsa.watching.gradients import Gradients
from lsa.watching.losses import Losses
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
    if norms < 1:
        raise InputError(f"norms={norms} is no number of steps; choose 1 or more")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget={budget} is no share of time; choose one above 0, up to 1")
    return Watch(model, optimizers, norms=norms, budget=budget, scaler=scaler, strict=strict)


class Watch:
    """A training that is watched; `lsa.watch` makes it.

    Attributes:
        step: Number of the last optimizer step.
        rows: What was measured, one mapping a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        norms: int,
        budget: float | None,
        scaler: Any,
        strict: bool,
    ) -> None:
        self.step = 0
        self.rows: list[Row] = []
        self._weights = Weights(model, optimizers)
        self._optimizers = list(optimizers)
        self._strict = strict
        self._every_norms = norms
        self._off: set[str] = set()  # parts that have failed
        self._measuring = False
        self._budget = Budget(budget)
        self._norms = norms_.Norms(self._weights)
        self._next_norms = 1
        self._handles: list[Any] = []
        leads = not dist.is_initialized() or dist.get_rank() == 0
        self._active = leads or self._weights.sharded
        self._gradients = Gradients(self._weights, scaler)
        self._losses = Losses()
        if self._active:
            self._handles = [
                *hooks.attach(self._optimizers, self),
                *self._gradients.attach(self._norms_are_due),
                *self._losses.attach(model),
            ]

    # --- what the hooks tell ---------------------------------------------------------------------

    def begins(self) -> None:
        """The first optimizer is about to step."""
        step = self.step + 1
        if step in (self._next_norms - 1, self._next_norms):
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
        if self.step == self._next_norms:
            row |= self._run("norms", self._measure_norms) or {}
            self._next_norms += self._budget.interval("norms", self._every_norms, 1.0)
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

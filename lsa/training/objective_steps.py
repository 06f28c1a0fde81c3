"""An epoch of steps on batches, each with an objective's loss of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lsa.landscape.batches import Batches, original
from lsa.landscape.terms import Objective, Terms, checked, unit_weights
from lsa.runtime.errors import InputError
from lsa.training import optimizers


def epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    source: Iterable[Any],
    *,
    clip_norm: float | None,
    before: Callable[[int], None],
    after: Callable[[int], None],
) -> tuple[float, float]:
    """One step on each batch, in the order in which the source gives them.

    A step's loss is total / weight + penalty of its batch. A batch without weight is passed over.

    Args:
        model: In training mode, on the device that shall compute.
        optimizer: Of its parameters.
        objective: `(model, batch) → Terms`.
        source: Batches.
        clip_norm: Bound of a gradient's norm; None: none.
        before: Told the number of each batch before its step.
        after: And after it.

    Returns:
        The loss Σ total / Σ weight (+ the mean penalty) over the epoch as it went, and the mean
        norm of the gradients before clipping.

    Raises:
        InputError: The source gives no batch with a weight.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums: list[Tensor] = []
    for i, batch in enumerate(Batches(source, parameters[0].device)):
        before(i)
        figures = _step(model, optimizer, objective, batch.content, parameters, clip_norm)
        if figures is not None:
            sums.append(figures)
        after(i)
    if not sums:
        raise InputError("no batch of the training split has any weight; nothing can be learned")
    total, weight, penalty, norm = torch.stack(sums).T
    return float(total.sum() / weight.sum() + penalty.mean()), float(norm.mean())


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    content: Any,
    parameters: list[nn.Parameter],
    clip_norm: float | None,
) -> Tensor | None:
    """One step: total, weight, penalty and gradient norm `(4,)` at the first evaluation."""
    first: list[Tensor] = []

    def closure() -> Any:
        optimizer.zero_grad()
        terms = checked(objective(model, original(content)))
        weight = unit_weights(terms).sum()
        if not bool(weight > 0):
            return terms.total.detach() * 0
        loss = _loss(terms, weight)
        loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not first:  # SAM and LBFGS evaluate again elsewhere
            penalty = terms.total.new_zeros(()) if terms.penalty is None else terms.penalty
            figures = (terms.total, weight, penalty, norm)
            first.append(torch.stack([f.detach().double().reshape(()) for f in figures]))
        if clip_norm:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        return loss

    optimizers.step(optimizer, closure)
    return first[0] if first else None


def _loss(terms: Terms, weight: Tensor) -> Tensor:
    mean = terms.total / weight.to(terms.total)
    return mean if terms.penalty is None else mean + terms.penalty

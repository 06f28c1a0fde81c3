"""The training's own loss, where it can be seen: by closures, loss modules and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsa.watching.hooks import OnModule
from lsa.watching.undisturbed import measuring

TOLD, RETURNED, OUTPUTS, MODULE = range(4)  # where a loss is seen; the first is believed first


class Losses:
    """Losses of the passes of one step; their mean is the step's.

    The loop knows its loss best, then its closure, the outputs of the model, and a loss that is a
    module, which may be one of several terms. So of these only one is taken. What hooks see must be
    one loss for each backward pass.

    Args:
        model: Whose outputs may have a `.loss`, which is the step's.
        loss: That may be a module.
        seen: Whether outputs of the model and what closures return are looked at.
    """

    def __init__(self, model: nn.Module, loss: Any = None, *, seen: bool = True) -> None:
        self._model, self._loss, self._looks = model, loss, seen
        self._told: dict[int, list[Tensor]] = {}
        self._complete = False  # the passes that the step was made from are over

    def attach(
        self, due: Callable[[], bool], run: Callable[[Callable[[], None]], Any]
    ) -> list[Any]:
        """Hooks on a model whose outputs have a `.loss`, and on a loss that is a module.

        Args:
            due: Whether the loss of the step at hand is wanted.
            run: Does the work of a hook.
        """

        def hook(take: Callable[[Any], None]) -> Callable[..., None]:
            def told(_module: Any, _inputs: Any, output: Any) -> None:
                # Inside of a compiled model it is no part of it.
                if not torch.compiler.is_compiling() and due() and not measuring():
                    run(lambda: take(output))

            return OnModule(told)

        handles = []
        if self._looks:
            handles.append(self._model.register_forward_hook(hook(self._seen)))
        if isinstance(self._loss, nn.Module):
            take = hook(lambda value: self._own(value, MODULE))
            handles.append(self._loss.register_forward_hook(take))
        return handles

    def returned(self, value: Any) -> None:
        """What a closure has returned, which the optimizer may call again."""
        if self._looks:
            self._add(value, RETURNED)

    def complete(self) -> None:
        """The step has its gradients: other passes of it are of other weights."""
        self._complete = True

    def add(self, loss: Any) -> None:
        """A loss, as the loop tells it; what is no number is ignored."""
        self._add(loss, TOLD)

    def _add(self, loss: Any, source: int) -> None:
        if not isinstance(loss, Tensor):
            loss = loss.item() if getattr(loss, "size", None) == 1 else loss
            if not isinstance(loss, int | float):
                return
            loss = torch.tensor(float(loss), device="cpu")
        if loss.numel() == 1:
            self._told.setdefault(source, []).append(loss.detach().reshape(()))

    def _seen(self, output: Any) -> None:
        value = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        self._own(value, OUTPUTS)

    def _own(self, value: Any, source: int) -> None:
        if torch.is_grad_enabled() and isinstance(value, Tensor) and not self._complete:
            self._add(value, source)

    def mean(self, passes: int = 0, dropped: int = 0) -> Tensor | None:
        """The mean of those since the last call, in float64; None where it is not known.

        Args:
            passes: Backward passes that the step was made from; 0 where they were not counted.
            dropped: How many of the first are of passes that no step has used.
        """
        source = min(self._told, default=MODULE)
        told = self._told.get(source, [])
        self.forget()
        told = told[dropped:] if dropped < len(told) else told
        if source in (OUTPUTS, MODULE) and len(told) != (passes or 1):
            return None
        return torch.stack(told).double().mean() if told else None

    def forget(self) -> None:
        """Let go of those of a step that is not measured."""
        self._told, self._complete = {}, False

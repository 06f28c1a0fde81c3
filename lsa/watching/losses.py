"""The training's own loss, where it can be seen: by closures, loss modules and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsa.watching.hooks import OnModule
from lsa.watching.undisturbed import measuring


class Losses:
    """Losses of the passes of one step; their mean is the step's.

    Args:
        model: Whose outputs may have a `.loss`, which is the step's.
        loss: That may be a module.
        seen: Whether outputs of the model and what closures return are looked at.
    """

    def __init__(self, model: nn.Module, loss: Any = None, *, seen: bool = True) -> None:
        self._model, self._loss, self._looks = model, loss, seen
        self._told: list[Tensor] = []

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
            handles.append(self._loss.register_forward_hook(hook(self._own)))
        return handles

    def returned(self, value: Any) -> None:
        """What a closure has returned."""
        if self._looks:
            self.add(value)

    def add(self, loss: Any) -> None:
        """A loss, as the loop tells it; anything else is ignored."""
        if isinstance(loss, int | float):
            loss = torch.tensor(float(loss))
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._told.append(loss.detach().reshape(()))

    def _seen(self, output: Any) -> None:
        self._own(output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None))

    def _own(self, value: Any) -> None:
        if torch.is_grad_enabled() and isinstance(value, Tensor):
            self.add(value)

    def mean(self, dropped: int = 0) -> Tensor | None:
        """The mean of those since the last call, in float64; None where there was none.

        Args:
            dropped: How many of the first are of passes that no step has used.
        """
        told, self._told = self._told, []
        told = told[dropped:] if dropped < len(told) else told
        return torch.stack(told).double().mean() if told else None

    def forget(self) -> None:
        """Let go of those of a step that is not measured."""
        self._told = []

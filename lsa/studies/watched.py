"""`train: {watch: …}` of a project: `lsa.watch` in a tracked training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lsa.project import Recipe
from lsa.training.data import Data, Streams
from lsa.training.recipes import loss_of, objective_of

Log = Callable[[Mapping[str, float], int], None]


class Watched:
    """A training's watch, and its numbers, which are kept with the training's state.

    Args:
        recipe: Of the training.
        split: Its data; the probe set is drawn from the training split, the same for all seeds.
        trusted: Packages whose factories may be imported.
        log: Takes the numbers of a step.
        earlier: Steps and numbers of an interrupted training that goes on; they are logged again.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: Data | Streams,
        trusted: Collection[str],
        log: Log,
        earlier: list[Any],
    ) -> None:
        self._recipe, self._split, self._trusted, self._log = recipe, split, trusted, log
        self.numbers: list[Any] = []  # [step, {name: value}]
        for step, values in earlier:
            self._take(values, step)

    def _take(self, values: Mapping[str, float], step: int) -> None:
        self.numbers.append([step, dict(values)])
        self._log(values, step)

    @property
    def attach(self) -> Callable[[nn.Module, Any, int], AbstractContextManager[Any]] | None:
        """For `lsa.training.train.train`; None where the project asks for no watch."""
        return None if self._recipe.train.watch is None else self._attach

    def _attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, before: int
    ) -> AbstractContextManager[Any]:
        from lsa.watching.watch import watch  # not for a training without

        chosen, split = self._recipe.train.watch, self._split
        assert chosen is not None
        if isinstance(split, Streams):
            where = {
                "batches": split.train,  # the first eight
                "objective": objective_of(self._recipe, self._trusted),
            }
        else:
            n = len(split.x_train)
            drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: chosen.samples]
            drawn = drawn.to(split.x_train.device)
            where = {
                "batches": (split.x_train.index_select(0, drawn), split.y_train[drawn]),
                "loss": loss_of(self._recipe, self._trusted),
            }
        return watch(
            model,
            optimizer,
            **where,
            measure=chosen.measure,
            every=chosen.every,
            norms=chosen.norms,
            budget=chosen.budget,
            step=before,
            sink=self._take,
        )

"""What the callbacks of trainers share."""

from __future__ import annotations

from typing import Any

from lsa.landscape.terms import Objective
from lsa.watching.watch import watch
from lsa.watching.watched import Watch


class Watching:
    """A callback that watches from the beginning of a training to its end.

    Args:
        objective: Of the trainer: what `batches` are measured by, unless another is given.
        options: Of `lsa.watch`.

    Attributes:
        watch: The `Watch`, once the training has begun.
    """

    watch: Watch | None = None

    def __init__(self, objective: Objective, options: dict[str, Any]) -> None:
        own = "batches" in options and not {"loss", "objective"} & options.keys()
        self._options = {**options, "objective": objective} if own else options

    def _begin(self, model: Any, optimizers: Any, **known: Any) -> None:
        """Watch, with what the trainer is known to do and what the user has asked for."""
        self.watch = watch(model, optimizers, **(known | self._options))

    def _end(self, status: str = "FINISHED") -> None:
        """Close the watch."""
        if self.watch is not None:
            self.watch.close(status)

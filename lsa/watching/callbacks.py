"""What the callbacks of trainers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lsa.landscape.terms import Objective
from lsa.watching.watch import watch
from lsa.watching.watched import Watch


class Watching:
    """A callback that watches from the beginning of a training to its end.

    Args:
        objective: Makes that of the trainer: what `batches` are measured by, unless another is
            given. It is made when the training begins: trainers send callbacks to processes.
        options: Of `lsa.watch`.

    Attributes:
        watch: The `Watch`, once the training has begun.
    """

    watch: Watch | None = None

    def __init__(self, objective: Callable[[], Objective], options: dict[str, Any]) -> None:
        self._objective, self._options = objective, options

    def _begin(self, model: Any, optimizers: Any, **known: Any) -> None:
        """Watch, with what the trainer is known to do and what the user has asked for."""
        if self.watch is not None:  # of a training that was interrupted
            self.watch.close()
        options = known | self._options
        if "batches" in options and not {"loss", "objective"} & options.keys():
            options["objective"] = self._objective()
        self.watch = watch(model, optimizers, **options)

    def _end(self, status: str = "FINISHED") -> None:
        """Close the watch."""
        if self.watch is not None:
            self.watch.close(status)

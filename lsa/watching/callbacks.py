"""What the callbacks of trainers share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lsa.landscape.terms import Objective
from lsa.watching.watch import WITHOUT_BATCHES, watch
from lsa.watching.watched import Watch

log = logging.getLogger("lsa.watch")


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

    def _begin(
        self,
        model: Any,
        optimizers: Any,
        *,
        refusal: str = "",
        converted: Callable[[Any], Any] | None = None,
        **known: Any,
    ) -> None:
        """Watch, with what the trainer is known to do and what the user has asked for.

        Args:
            model: That is trained.
            optimizers: Of the trainer.
            refusal: Why the trainer's objective cannot be measured; "" where it can.
            converted: A batch of the loader ↦ the batch that the model is given; None: the same.
            **known: Options, unless the user gives others.
        """
        if self.watch is not None:  # of a training that was interrupted
            self.watch.close()
        options = known | self._options
        if "batches" in options and not {"loss", "objective"} & options.keys():
            if refusal:
                log.warning("watch: nothing is measured on batches: %s", refusal)
                options = _without_batches(options)
            else:
                options["objective"] = _of_converted(self._objective(), converted)
        self.watch = watch(model, optimizers, **options)

    def _end(self, status: str = "FINISHED") -> None:
        """Close the watch."""
        if self.watch is not None:
            self.watch.close(status)


def _of_converted(objective: Objective, converted: Callable[[Any], Any] | None) -> Objective:
    if converted is None:
        return objective
    return lambda model, batch: objective(model, converted(batch))


def _without_batches(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a watch that measures nothing on batches."""
    measure = options.get("measure")
    if measure is not None and not isinstance(measure, str):
        measure = [kind for kind in measure if kind in WITHOUT_BATCHES]
    return {k: v for k, v in options.items() if k != "batches"} | {"measure": measure}

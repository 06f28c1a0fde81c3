"""`lsa.watch` as a callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import torch

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]

from lsa.landscape import objectives
from lsa.watching.callbacks import Watching


class LightningCallback(Watching, Callback):  # pyright: ignore[reportGeneralTypeIssues]  # one of two
    """Watch a Lightning training: `Trainer(callbacks=[lsa.watching.LightningCallback()])`.

    Args:
        **options: Of `lsa.watch`. With `batches`, the objective is the module's `training_step`
            (`lsa.objectives.lightning()`), unless another is given; a module that optimizes by hand
            needs another.

    Attributes:
        watch: The `Watch`, once the training has begun.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(objectives.lightning, options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the optimizers that the module has configured."""
        run = next((str(r) for r in map(_run, trainer.loggers) if r), None)
        self._begin(
            pl_module,
            trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            step=trainer.global_step,
            refusal="" if pl_module.automatic_optimization else objectives.BY_HAND,
            converted=trainer.precision_plugin.convert_input,  # to float64 or half precision
            # Told below: a closure returns the last pass's part of an accumulated step.
            sees_loss=not pl_module.automatic_optimization,
            **({} if run is None else {"track": run}),
        )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the batch: its samples are those of the noise."""
        if self.watch is not None:
            self.watch.batch(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Tell the loss of a pass, which is scaled and weighed for the step's sum by now."""
        if self.watch is not None and pl_module.automatic_optimization:
            own = loss.detach() * trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:  # whose scale a GPU need not tell here
                own = own / scaler.scale(torch.ones_like(own))
            self.watch.loss(own)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the watch."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the watch of a training that has failed."""
        self._end("FAILED")


def _run(logger: Any) -> str | None:
    """The run of a logger to MLflow."""
    return logger.run_id if type(logger).__name__ == "MLFlowLogger" else None

"""`lsa.watch` as a callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

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
            (`lsa.objectives.lightning()`), unless another is given.

    Attributes:
        watch: The `Watch`, once the training has begun.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(objectives.lightning(), options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the optimizers that the module has configured."""
        run = next((str(r) for r in map(_run, trainer.loggers) if r), None)
        self._begin(
            pl_module,
            trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            step=trainer.global_step,
            **({} if run is None else {"track": run}),
        )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the batch: its samples are those of the noise."""
        if self.watch is not None:
            self.watch.batch(batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the watch."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the watch of a training that has failed."""
        self._end("FAILED")


def _run(logger: Any) -> str | None:
    """The run of a logger to MLflow."""
    return logger.run_id if type(logger).__name__ == "MLFlowLogger" else None

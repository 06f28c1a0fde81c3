"""`lsa.watch` as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

from lsa.landscape import objectives
from lsa.watching.callbacks import Watching


class HuggingFaceCallback(Watching, TrainerCallback):
    """Watch a `transformers.Trainer`: `Trainer(…, callbacks=[lsa.watching.HuggingFaceCallback()])`.

    Args:
        **options: Of `lsa.watch`. With `batches`, the objective is the model's own loss
            (`lsa.objectives.hf()`), unless another is given.

    Attributes:
        watch: The `Watch`, once the training has begun.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(objectives.hf, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Watch the optimizer that the Trainer has made."""
        optimizer = given["optimizer"]
        self._begin(
            given["model"],
            optimizer,
            scaler=getattr(optimizer, "scaler", None),
            step=state.global_step,
            # Passes of an accumulated step are weighed by their tokens before they are summed.
            sees_loss=args.gradient_accumulation_steps == 1,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Close the watch."""
        self._end()

"""What the callbacks of trainers share."""

from __future__ import annotations

from typing import Any

from lsa.landscape.terms import Objective


def with_objective(options: dict[str, Any], objective: Objective) -> dict[str, Any]:
    """Options of `lsa.watch`: with `batches`, the trainer's objective, unless another is given."""
    if "batches" in options and not {"loss", "objective"} & options.keys():
        return {**options, "objective": objective}
    return options

"""A landscape in float64, for probes that float32 would lose."""

from __future__ import annotations

import torch

from lsa.landscape.landscape import Landscape
from lsa.runtime.errors import InputError, first_line


def in_float64(landscape: Landscape) -> Landscape:
    """The same landscape in float64, tried on its first unit.

    Raises:
        InputError: An operation of the network has no float64.
    """
    fine = landscape.double()
    first = fine.subset(torch.arange(1, device=fine.device))
    try:
        first.loss(first.theta)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"this probe computes in float64, which the network cannot ({first_line(error)}); give "
            "it operations that can (experts of Hugging Face: "
            "model.set_experts_implementation('eager')), or take another probe"
        ) from error
    return fine

"""A probe in a package of its own."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape
from lsa.probe import Metric, Result, probe


@probe(headline=("loss_rise",))
def bump(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    *,
    radius: Annotated[float, "length of the step", Field(gt=0)] = 0.1,
) -> Result:
    """Loss rise after a random step of fixed length.

    The rise is paired by sample, so its standard error is that of the differences.
    """
    step = torch.randn(len(theta), generator=rng).to(theta)
    there = theta + radius * step / step.norm()
    rises = (landscape.losses(there) - landscape.losses(theta)).double()
    error = rises.std().item() / len(rises) ** 0.5
    return Result({"loss_rise": Metric(rises.mean().item(), "loss", {"data": error})})

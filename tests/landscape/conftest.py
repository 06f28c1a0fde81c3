"""A landscape that many tests of this room take."""

from __future__ import annotations

import pytest
import torch
from tiny import normal, rng, seeded
from torch import nn

from lsa.landscape import Landscape, flatten


@pytest.fixture
def mlp() -> tuple[Landscape, torch.Tensor]:
    """A perceptron of 66 parameters in float64 on 23 samples in uneven chunks, and its θ."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    y = torch.randint(0, 3, (23,), generator=rng())
    return Landscape(model, normal(23, 5), y, chunk=7), flatten(model)

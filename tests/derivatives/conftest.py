"""Fixtures of the tests of derivatives."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def double():
    """Networks and data in float64, from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)

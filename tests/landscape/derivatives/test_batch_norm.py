"""Batch norm: statistics estimated anew are those of the data, and models without it are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lsa.landscape.derivatives import batch_norm
from lsa.runtime.errors import InputError


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 2)).eval()


def test_recalibrated_statistics_are_the_mean_over_the_batches():
    model, x = network(), torch.randn(300, 3)
    batch_norm.recalibrate(model, x)
    (layer,) = batch_norm.layers(model)
    batches = [model[0](part) for part in x.tensor_split(2)]  # 300 is twice 128, and more
    mean = torch.stack([part.mean(0) for part in batches]).mean(0)
    variance = torch.stack([part.var(0) for part in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)
    assert not layer.training


def test_a_layer_on_its_batch_keeps_nothing():
    model, x = network(), torch.randn(20, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch_norm.use_batches(model)
    inner = model[1](model[0](x))
    torch.testing.assert_close(inner.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_layers_without_statistics_are_named():
    batch_norm.check_statistics(network())
    without = network(track_running_stats=False)
    with pytest.raises(InputError, match="'1' keeps no running statistics"):
        batch_norm.check_statistics(without)
    assert not batch_norm.tracks_statistics(without)
    assert batch_norm.tracks_statistics(network())
    assert not batch_norm.layers(nn.Linear(2, 2))

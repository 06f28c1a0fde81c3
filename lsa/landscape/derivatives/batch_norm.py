"""Batch norm, the layer whose statistics make a sample's loss depend on other samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lsa.runtime.errors import InputError

BATCH = 128  # samples, about, of one batch of statistics

_BatchNorm = nn.modules.batchnorm._BatchNorm


def layers(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch-norm layers, of any dimension."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def check_statistics(model: nn.Module) -> None:
    """See that every layer has statistics of its own.

    Raises:
        InputError: One has none, so that the loss would depend on how the samples are divided.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise InputError(
                f"batch norm {name!r} keeps no running statistics, so a sample's loss depends "
                "on its batch; build it with track_running_stats=True"
            )


def check_mode(model: nn.Module) -> None:
    """See that every layer of an evaluated network uses its running statistics.

    Raises:
        InputError: One stays in training mode, so that samples interact and statistics change.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise InputError(
                f"batch norm {name!r} stays in training mode although the network is evaluated, so "
                "a sample's loss depends on its batch; see which train() or eval() is overridden"
            )


def tracks_statistics(model: nn.Module) -> bool:
    """Whether a layer's running statistics could be estimated anew."""
    return any(layer.track_running_stats for layer in layers(model))


@torch.no_grad()
def recalibrate(model: nn.Module, x: Tensor) -> None:
    """Estimate the running statistics anew.

    One pass in training mode of these layers alone, cumulative averages over the batches
    (Izmailov et al. 2018, arXiv 1803.05407, §3.2).

    Args:
        model: In `eval()` mode; its running statistics are overwritten.
        x: Inputs `(N, …)`.
    """
    with cumulating(model):
        # Batches as even as can be: the average over them is unweighted.
        for batch in x.tensor_split(max(1, len(x) // BATCH)):
            model(batch)


@contextmanager
def cumulating(model: nn.Module) -> Iterator[None]:
    """Within the block passes through the model average its running statistics anew."""
    tracking = [layer for layer in layers(model) if layer.track_running_stats]
    for layer in tracking:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    yield
    for layer in tracking:
        layer.eval()


def use_batches(model: nn.Module) -> None:
    """Let every layer take the statistics of the samples in hand, and keep none."""
    for layer in layers(model):
        layer.train()
        layer.track_running_stats = False  # they would be written to, and are not read

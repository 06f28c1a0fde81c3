"""What is measured on: a network, trained a little, and images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.training import data, models


def images(folder: str | None, samples: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images `(n, 3, 32, 32)` and labels of class folders such as CIFAR-10's, else of digits."""
    if folder:
        split = data.load("image_folder", root=folder, train_limit=samples, device=device)
        return split.x_train, split.y_train
    split = data.load("digits", device=device)
    x = F.interpolate(split.x_train, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    repeats = -(-samples // len(x))
    return x.repeat(repeats, 1, 1, 1)[:samples], split.y_train.repeat(repeats)[:samples]


def network(
    name: str, x: Tensor, y: Tensor, epochs: int = 2, seed: int = 0, **options: Any
) -> nn.Module:
    """A network after a few epochs of plain SGD; the seed is that of weights and batches."""
    model = models.build(name, input_shape=tuple(x.shape[1:]), classes=10, seed=seed, **options)
    model.to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in data.batches(len(x), 64, rng):
            index = index.to(x.device)
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval()


def landscape(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[Landscape, Tensor]:
    """The landscape of the model, and its parameters."""
    return Landscape(model, x, y, **options), flatten(model).to(x.device)

"""An epoch of `lsa train` against a bare loop and against a DataLoader pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.timing import alternate
from lsa.project import Named, Recipe, Split, Train
from lsa.training import data, models
from lsa.training.data import Data
from lsa.training.train import train

IMAGES = {"simple_cnn": 8192, "mlp": 40_000}  # of CIFAR-10's 50,000
BATCH = 128
ROUNDS = 9  # five were too few on a host that drifts: 0.76 and 0.97 within hours
RATE = 0.01


class Images(Dataset):
    """Images as a data set on disk gives them: uint8, transformed one at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x = (x * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).cpu()
        self._y = y.tolist()
        self._transform = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
        )

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._transform(self._x[i]), self._y[i]


def rows(x: Tensor, y: Tensor) -> list[dict]:
    """Per network: seconds of one epoch each way."""
    found: list[dict[str, Any]] = []
    for name, n in IMAGES.items():
        seconds = alternate(_epochs(name, x[:n], y[:n]), ROUNDS)
        found += [
            {
                "network": name,
                "images": min(n, len(x)),
                "loop": loop,
                "seconds": s,
                "of lsa's": s / seconds["lsa"],
            }
            for loop, s in seconds.items()
        ]
    return found


def _epochs(name: str, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """One epoch as a call, from the same initial weights, by the loop that makes it."""
    recipe = Recipe(
        project="benchmark",
        optimizer="sgd",
        seed=0,
        dataset=Named(name="digits"),
        model=Named(name=name),
        train=Train(epochs=1, batch_size=BATCH),
        rule=Named(name="SGD", lr=RATE),  # type: ignore[call-arg]
        landscape=Split(),
    )
    silent = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"noise_scale": False})}
    )
    split = Data(x, y, x[:1], y[:1], 10, hash="")
    order = data.batches(len(x), BATCH, torch.Generator().manual_seed(0))
    batches = [(x[i], y[i]) for i in (index.to(x.device) for index in order)]
    loader = DataLoader(Images(x, y), batch_size=BATCH, shuffle=True)

    def loop(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        model = models.build(name, input_shape=tuple(x.shape[1:]), classes=10, seed=0)
        model.to(x.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for inputs, targets in batches:
            _step(model, optimizer, inputs.to(x.device), targets.to(x.device))

    return {
        "lsa": lambda: list(train(recipe, split)),
        "lsa without noise scale": lambda: list(train(silent, split)),
        "bare loop": lambda: loop(batches),
        "DataLoader": lambda: loop(loader),
    }


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

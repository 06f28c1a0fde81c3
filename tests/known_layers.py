"""Networks of the layers whose gradients are known sample by sample, and losses on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

N = 5


class Applied(nn.Module):
    """A module from a function of its parameters by name, and of its input."""

    def __init__(self, function: Callable, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, **dict(self.named_parameters()))


def losses(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss of each sample as a function of θ, of more than first order in the outputs."""
    names, parts = zip(*model.named_parameters(), strict=True)

    def of(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in parts])
        weights = {n: t.view(p.shape) for n, p, t in zip(names, parts, pieces, strict=True)}
        outputs = functional_call(model, weights, (x,))
        return (outputs.tanh() + 0.1 * outputs.square()).flatten(1).sum(1)

    return of


def image(channels: int = 3) -> tuple[int, ...]:
    return (N, channels, 6, 5)


def trained_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(image(4)))
    return norm.eval()


def grown(module: nn.Module) -> nn.Module:
    """Scales and shifts that are not the ones and zeros of a new layer."""
    for p in module.parameters():
        nn.init.normal_(p)
    return module


class Shared(nn.Module):
    """One layer used twice, the second time on what has been added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += x
        return self.layer(y)


class Checkpointed(nn.Module):
    """Keeps no activations, but computes them again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


KNOWN: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear": lambda: (nn.Linear(4, 3), (N, 4)),
    "linear on tokens": lambda: (nn.Linear(4, 3), (N, 7, 4)),
    "convolution": lambda: (nn.Conv2d(3, 4, 3, padding=1), image()),
    "strided": lambda: (nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0), bias=False), image()),
    "dilated": lambda: (nn.Conv2d(3, 2, 2, dilation=2), image()),
    "grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2), image(4)),
    "depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4, padding=1), image(4)),
    "1-d": lambda: (nn.Conv1d(3, 4, 3, stride=2, padding=1), (N, 3, 8)),
    "3-d": lambda: (nn.Conv3d(2, 2, 2), (N, 2, 4, 3, 3)),
    "batch norm": lambda: (grown(trained_batch_norm()), image(4)),
    "group norm": lambda: (grown(nn.GroupNorm(2, 4)), image(4)),
    "layer norm": lambda: (grown(nn.LayerNorm(4)), (N, 7, 4)),
    "layer norm of images": lambda: (grown(nn.LayerNorm((6, 5))), image()),
    "shared": lambda: (Shared(), (N, 4)),
    "a network": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), grown(nn.GroupNorm(2, 4)),
            nn.MaxPool2d(2), nn.Conv2d(4, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
        ),
        image(),
    ),
}  # fmt: skip

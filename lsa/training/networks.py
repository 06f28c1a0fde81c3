"""Networks of lsa's own: `simple_cnn`, `mlp` and `resnet20`.

They contain no in-place operation and no data-dependent control flow, so they work under
`torch.func` transforms and forward-mode differentiation.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from lsa.runtime.errors import InputError

Shape = tuple[int, ...]
DEEPEST = 1000  # hidden layers; a stranger's checkpoint may ask for any number of them

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}


def _image(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InputError(
            f"input shape {shape} is not (channels, height, width); choose the model mlp."
        )
    return shape[0], shape[1], shape[2]


def _kaiming_normal(model: nn.Module) -> None:
    """Weights N(0, 2 / fan_in), zero biases (He et al. 2015, §2.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def simple_cnn(
    input_shape: Shape,
    classes: int,
    width: PositiveInt = 64,
    init: Literal["kaiming_normal", "default"] = "kaiming_normal",
) -> nn.Sequential:
    """Three blocks of 3×3 convolution, 2×2 max-pool and ReLU, then linear → 32 → `classes`.

    No normalisation, so the loss is a function of the weights alone. With width 64, 32×32 colour
    images and 10 classes it has 182,570 parameters, the network of the reference study.

    Args:
        input_shape: `(channels, height, width)` of an image. A pool is left out where a side is
            already below 2, so that any size fits.
        classes: Number of logits.
        width: Channels of the first and third block; the second has twice as many.
        init: `kaiming_normal` (He et al. 2015; biases zero) or `default`, that of PyTorch.

    Raises:
        InputError: The input is no image.
    """
    channels, height, side = _image(input_shape)
    layers: list[nn.Module] = []
    for out in (width, 2 * width, width):
        layers.append(nn.Conv2d(channels, out, 3, padding=1))
        if min(height, side) >= 2:
            layers.append(nn.MaxPool2d(2))  # before the ReLU: the same, of a quarter of the numbers
            height, side = height // 2, side // 2
        layers.append(nn.ReLU())
        channels = out
    layers += [nn.Flatten(), nn.Linear(channels * height * side, 32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, classes))
    if init == "kaiming_normal":
        _kaiming_normal(model)
    return model


def mlp(
    input_shape: Shape,
    classes: int,
    hidden: tuple[PositiveInt, ...] = (200, 200),
    activation: Literal["relu", "tanh", "gelu", "silu", "softplus", "sigmoid"] = "relu",
) -> nn.Sequential:
    """Fully connected network on the flattened input, PyTorch's default initialisation.

    Args:
        input_shape: Of one sample.
        classes: Number of logits.
        hidden: Widths of the hidden layers; none makes it softmax regression. Two layers of 200
            are the network of Li et al. 2018 (intrinsic dimension), §3.
        activation: Between the layers; the smooth ones have a Hessian everywhere.

    Raises:
        InputError: More than 1,000 hidden layers.
    """
    if len(hidden) > DEEPEST:
        raise InputError(f"model mlp of {len(hidden)} hidden layers; give at most {DEEPEST}.")
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def resnet20(
    input_shape: Shape,
    classes: int,
    norm: Literal["batch", "group"] = "batch",
    width: PositiveInt = 16,
) -> nn.Sequential:
    """ResNet-20 in its CIFAR form (He et al. 2016, §4.2), shortcuts without parameters (option A).

    With batch norm, colour images and 10 classes it has 269,722 parameters.

    Args:
        input_shape: `(channels, height, width)` of an image.
        classes: Number of logits.
        norm: `batch`, or `group` (Wu & He 2018; 8 groups, chosen here for the narrow stages), with
            which the loss is a function of the weights alone: no running statistics.
        width: Channels of the first stage; the later two have 2 and 4 times as many.

    Raises:
        InputError: The input is no image.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(_image(input_shape)[0], width, 3, padding=1, bias=False),
        _norm(norm, width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(3):
        for block in range(3):
            out = width * 2**stage
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_Block(channels, out, stride, norm))
            channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    model = nn.Sequential(*layers)
    _kaiming_normal(model)
    return model


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(8, channels), channels)  # the groups must divide the channels


class _Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), option A shortcut."""

    def __init__(self, channels: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, out)
        self.stride, self.extra = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y)

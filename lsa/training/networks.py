"""Networks by name: `simple_cnn`, `mlp`, `resnet20`, torchvision's classifiers, or your own.

Our own networks contain no in-place operation and no data-dependent control flow, so they work
under `torch.func` transforms and forward-mode differentiation.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from lsa.project import factories
from lsa.runtime import modes
from lsa.runtime.errors import InputError

Shape = tuple[int, ...]
OWN = "name a factory of yours, package.module:factory"

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}


@modes.usual()
def build(
    name: str,
    *,
    input_shape: Shape | None,
    classes: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    logits: bool = True,
    trusted: Collection[str] = (),
    **options: Any,
) -> nn.Module:
    """Network f: inputs `(n, *input_shape)` → logits `(n, classes)`, initialised from `seed`.

    It is made on the CPU in float32, so that one seed gives the same weights whatever the device
    that trains them. The global random state is left as it was.

    Args:
        name: `simple_cnn`, `mlp`, `resnet20`, a classifier of `torchvision.models` by its name
            there, or `package.module:factory`, called as
            `factory(input_shape=…, classes=…, **options)`, with those of the two that it names.
        input_shape: Of one sample, `(channels, height, width)` for images; None where batches are
            no tensors, so that only a factory of one's own knows it.
        classes: Number of logits.
        seed: Of the initial weights.
        dtype: Of the inputs, integers for token numbers.
        logits: Whether the outputs must be `(n, classes)`; with a loss of one's own they need not.
        trusted: Top-level packages whose factories may be imported.
        **options: Of the named factory.

    Raises:
        InputError: Unknown name or option, a factory that is not trusted, or a network that does
            not take such inputs or does not return such logits.
    """
    make = _factory(name, input_shape and tuple(input_shape), classes, trusted, options)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it would reseed the accelerators' generators as well.
        torch.default_generator.manual_seed(seed)
        try:
            model = make()
        except Exception as error:  # torch's classes raise whatever they like
            if isinstance(error, InputError) or factories.is_own(name):
                raise
            reason = factories.one_line(error)
            raise InputError(f"model {name} cannot be made: {reason}; choose others.") from error
        if not isinstance(model, nn.Module):
            raise InputError(f"model {name} made a {type(model).__name__}, not a torch.nn.Module.")
        _check_real(name, model)
        model = model.to("cpu", torch.float32)
        if input_shape is not None:
            _check(name, model, tuple(input_shape), dtype, classes if logits else None)
    return model


def _factory(
    name: str, shape: Shape | None, classes: int, trusted: Collection[str], options: dict[str, Any]
) -> Callable[[], nn.Module]:
    label = f"model {name}"
    if name in OURS or ":" in name:
        given = {} if shape is None else {"input_shape": shape, "classes": classes}
        if ":" in name:
            return lambda: factories.make(label, name, nn.Module, trusted, options, **given)
        if shape is None:
            raise InputError(f"{label} needs the inputs' shape, which batches do not tell; {OWN}")
        checked = factories.check_options(label, OURS[name], options, tuple(given))
        return lambda: OURS[name](**given, **checked)

    from torchvision import models  # slow to import, and most projects do without

    known = models.list_models(module=models)
    if name not in known:
        hint = factories.nearest(name, [*OURS, *known])
        raise InputError(
            f"unknown model {name!r}.{hint} Known are {', '.join(OURS)}, the classifiers of "
            "torchvision.models, and package.module:factory."
        )
    builder = models.get_model_builder(name)
    checked = _torchvision_options(label, builder, options)

    def make() -> nn.Module:
        try:
            return builder(weights=None, num_classes=classes, **checked)
        except (TypeError, ValueError) as error:
            raise InputError(f"{label} cannot be made: {factories.one_line(error)}.") from error

    return make


def _torchvision_options(label: str, builder: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Check against the class that the builder returns: the builder itself takes any keyword."""
    network = typing.get_type_hints(builder)["return"]
    known = inspect.signature(network).parameters
    # GoogLeNet and Inception: logits and nothing else, and no warning about their initialisation.
    ours = {"aux_logits": False, "init_weights": True}
    ours = {name: value for name, value in ours.items() if name in known}
    checked = factories.check_options(label, network, options, ["num_classes"], complete=False)
    return ours | checked


def _check_real(name: str, model: nn.Module) -> None:
    """Refuse complex weights, of which float32 would keep the real part alone."""
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.dtype.is_complex:
            raise InputError(
                f"model {name} has complex weights ({key}); lsa measures real ones: write each as "
                "its real and its imaginary part."
            )


def _check(
    name: str, model: nn.Module, shape: Shape, dtype: torch.dtype, classes: int | None
) -> None:
    """Try the network on zeros; this also gives lazy modules their seeded weights."""
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(2, *shape, dtype=dtype))
    except Exception as error:
        refusals = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)
        if factories.is_own(name) and not isinstance(error, refusals):
            raise
        message = factories.one_line(error)
        raise InputError(
            f"model {name} does not take inputs of shape {shape}: {message}; choose another model "
            "or image size."
        ) from error
    if classes is None:
        model.train()
        return
    if not isinstance(outputs, Tensor) or outputs.shape != (2, classes):
        actual = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"model {name} returns {actual} for two samples; it must return logits (2, {classes})."
        )
    model.train()


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
    """
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


OURS: dict[str, Callable[..., nn.Module]] = {
    "simple_cnn": simple_cnn,
    "mlp": mlp,
    "resnet20": resnet20,
}

"""Which hidden units of a network may be renumbered without changing its function.

The forward pass is traced to a graph, and each channel of each intermediate result is given a unit.
Units that meet in a sum become one: a residual stream has one order for all its blocks, and a
zero-padded shortcut ties a part of the next stage's channels to it. A flattened feature map repeats
its units over the positions. Units that occur at exactly the same places form a group and are
interchangeable. The network's inputs and outputs keep their order.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lsa.runtime.errors import InputError, first_line


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor, and where the units of each group lie on it."""

    dim: int
    positions: Mapping[str, Tensor]  # group -> (n, m): unit i lies at the m positions [i]


@dataclass(frozen=True)
class PermutationSpec:
    """Groups of interchangeable units, and every axis of every tensor that they index."""

    sizes: Mapping[str, int]  # group -> number of units n; named after the first layer with them
    axes: Mapping[str, tuple[Axis, ...]]  # tensor name -> its permutable axes
    buffers: frozenset[str]  # which of these tensors are buffers: permuted, but not matched


_PER_UNIT = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.PReLU)
_UNITWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish),
    nn.Hardsigmoid,
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
_UNITWISE_CALLS = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "tanh"),
    *("sigmoid", "softplus", "hardtanh", "hardswish", "hardsigmoid", "dropout"),
    *("contiguous", "stochastic_depth"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
}
_ARITHMETIC = {"add", "add_", "iadd", "sub", "isub", "mul", "mul_", "imul", "div", "truediv"}
_SUPPORTED = (
    "Conv2d, Linear, batch and instance norm, LayerNorm over units, elementwise activations, "
    "pooling, dropout, flatten, + − ×, concatenation and zero padding of channels"
)


def permutation_spec(model: nn.Module) -> PermutationSpec:
    """Groups of hidden units whose order is free (Ainsworth et al. 2023, §2), by tracing.

    Args:
        model: Convolutional or fully connected: `simple_cnn`, `mlp`, `resnet20` with batch norm,
            torchvision's VGG, ResNet, DenseNet, GoogLeNet, MobileNet and EfficientNet, and others
            made of the same operations.

    Raises:
        InputError: The network cannot be traced, or has an operation that is not known to keep
            units apart. Group norm mixes the units of a group, softmax and attention mix them all.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"cannot trace the forward pass of {type(model).__name__} ({reason}); alignment needs "
            "one without control flow that depends on the data"
        ) from error
    walk = _Walk(model)
    for node in graph.nodes:
        walk.visit(node)
    return walk.spec()


class _Signal(NamedTuple):
    """The unit at each channel of an intermediate result, and how the channels are laid out."""

    units: list[int] | None  # None: fixed, as those of the network's input
    layout: str  # "map" (N, units, H, W); "flat", the same flattened; "vector" (…, units)


def _unsupported(part: str) -> InputError:
    return InputError(f"cannot align {part}; supported are {_SUPPORTED}")


def _is_batch_size(argument: Any) -> bool:
    """Whether an argument is `x.size(0)` or `x.shape[0]`."""
    if not isinstance(argument, fx.Node) or argument.args[1:] != (0,):
        return False
    return argument.target == "size" or getattr(argument.target, "__name__", "") == "getitem"


class _Walk:
    """Follows units through a graph, merging those that must move together (union–find)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = dict(model.named_buffers())
        self.tensors = {**dict(model.named_parameters()), **self.buffers}
        self.parent = [0]  # of each unit; unit 0 stands for all fixed ones
        self.signals: dict[fx.Node, _Signal | None] = {}  # None: a shape, not a tensor
        self.axes: dict[tuple[str, int], list[int] | None] = {}

    # --- units ---

    def new(self, n: int) -> list[int]:
        units = list(range(len(self.parent), len(self.parent) + n))
        self.parent += units
        return units

    def find(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = unit = self.parent[self.parent[unit]]
        return unit

    def merge(self, x: list[int] | None, y: list[int] | None, where: str) -> list[int] | None:
        """Make the units of two lists the same, one by one."""
        if x is None or y is None:
            for unit in x or y or ():
                self.parent[self.find(unit)] = 0
            return None
        if len(x) != len(y):
            raise _unsupported(f"{where}, which joins {len(x)} with {len(y)} channels")
        for pair in zip(x, y, strict=True):
            low, high = sorted(map(self.find, pair))
            self.parent[high] = low
        return x

    def bind(self, name: str, dim: int, units: list[int] | None) -> None:
        """Let units index an axis of a tensor; a layer used twice has the same ones both times."""
        if name not in self.tensors:
            raise _unsupported(f"{name}, which is tied to another parameter or reparametrised")
        known = self.axes.get((name, dim), units)
        self.axes[name, dim] = self.merge(known, units, name)

    # --- the graph ---

    def visit(self, node: fx.Node) -> None:
        inputs = [s for s in (self.signals[n] for n in node.all_input_nodes) if s is not None]
        if node.op == "placeholder":
            self.signals[node] = _Signal(None, "map")
        elif node.op == "call_module" and len(inputs) == 1:
            name = str(node.target)
            self.signals[node] = self.layer(name, self.model.get_submodule(name), inputs[0])
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else node.target.__name__
            self.signals[node] = self.call(name, node, inputs)
        elif node.op == "output":
            for signal in inputs:
                self.merge(signal.units, None, "output")
        else:
            raise _unsupported(f"{node.target}")

    def layer(self, name: str, module: nn.Module, signal: _Signal) -> _Signal:
        if parametrize.is_parametrized(module):
            raise _unsupported(f"{name!r}, which is reparametrised")
        shared = isinstance(module, nn.PReLU) and module.num_parameters == 1
        if isinstance(module, _UNITWISE) or shared:
            return signal
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self.flat(signal)
        if isinstance(module, nn.Conv2d):
            return self.convolution(name, module, signal)
        if isinstance(module, nn.Linear) and (signal.layout != "map" or signal.units is None):
            self.bind(f"{name}.weight", 1, self.spread(signal, module.in_features, name))
            return _Signal(self.made_by(name, module), "vector")
        over_units = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
        if isinstance(module, _PER_UNIT) or (over_units and signal.layout != "map"):
            for key, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None and tensor.ndim == 1:
                    self.bind(f"{name}.{key}", 0, self.spread(signal, len(tensor), name))
            return signal
        raise _unsupported(f"the {type(module).__name__} {name!r}")

    def convolution(self, name: str, module: nn.Conv2d, signal: _Signal) -> _Signal:
        units = self.spread(signal, module.in_channels, name)
        if module.groups == 1:
            self.bind(f"{name}.weight", 1, units)
            return _Signal(self.made_by(name, module), "map")
        if module.groups != module.in_channels:
            raise _unsupported(f"the grouped Conv2d {name!r}")
        if units is not None:  # depthwise: each unit makes its own outputs
            units = [u for u in units for _ in range(module.out_channels // len(units))]
        self.bind_outputs(name, module, units)
        return _Signal(units, "map")

    def made_by(self, name: str, module: nn.Conv2d | nn.Linear) -> list[int] | None:
        """New units for the outputs of a layer; the same again when the layer is used twice."""
        if (f"{name}.weight", 0) not in self.axes:
            self.bind_outputs(name, module, self.new(module.weight.shape[0]))
        return self.axes[f"{name}.weight", 0]

    def bind_outputs(
        self, name: str, module: nn.Conv2d | nn.Linear, units: list[int] | None
    ) -> None:
        self.bind(f"{name}.weight", 0, units)
        if module.bias is not None:
            self.bind(f"{name}.bias", 0, units)

    def spread(self, signal: _Signal, n: int, where: str) -> list[int] | None:
        """The units of a signal along an axis of n entries: repeated if positions follow each."""
        if signal.units is None:
            return None
        positions, rest = divmod(n, len(signal.units))
        if rest or (positions != 1 and signal.layout != "flat"):
            raise _unsupported(f"{where!r}, which takes {n} of {len(signal.units)} channels")
        return [u for u in signal.units for _ in range(positions)]

    def flat(self, signal: _Signal) -> _Signal:
        return _Signal(signal.units, "flat") if signal.layout == "map" else signal

    def call(self, name: str, node: fx.Node, inputs: list[_Signal]) -> _Signal | None:
        arguments: list[Any] = [*node.args[1:], *node.kwargs.values()]
        if name == "size" or (name == "getattr" and arguments == ["shape"]) or not inputs:
            return None
        signal, other = inputs[0], inputs[-1]
        is_map = signal.layout == "map"
        alike = len({s.layout for s in inputs}) == 1
        detail = arguments[0] if arguments and isinstance(arguments[0], tuple | list) else ()
        if name in _UNITWISE_CALLS:
            return signal
        if name in _ARITHMETIC and (alike or signal.units is None or other.units is None):
            return _Signal(self.merge(signal.units, other.units, name), signal.layout)
        if name == "flatten" and arguments in ([1], [1, -1]):
            return self.flat(signal)
        if name in ("view", "reshape") and arguments[1:] == [-1] and _is_batch_size(arguments[0]):
            return self.flat(signal)
        if name == "mean" and is_map and sorted(detail) in ([2, 3], [-2, -1]):
            return _Signal(signal.units, "map" if True in arguments[1:] else "vector")
        if name in ("cat", "concat") and arguments == [1] and alike:
            return self.joined(node, signal.layout)
        if name == "getitem" and is_map and list(detail[:2]) == [slice(None)] * 2:
            return signal
        if name == "pad" and is_map:
            return self.padded(signal, detail, *arguments[1:2])
        raise _unsupported(f"the operation {name!r}")

    def joined(self, node: fx.Node, layout: str) -> _Signal:
        """Concatenation of channels."""
        units: list[int] = []
        for part in node.args[0]:  # type: ignore[union-attr]
            signal = self.signals[part]
            if signal is None or signal.units is None or layout == "flat":
                raise _unsupported("a concatenation with the network's input or of flattened maps")
            units += signal.units
        return _Signal(units, layout)

    def padded(self, signal: _Signal, widths: Sequence[int], mode: str = "constant") -> _Signal:
        """Constant padding, of positions or of channels: the latter adds units."""
        known = all(isinstance(width, int) and width >= 0 for width in widths)
        if len(widths) not in (2, 4, 6) or not known or mode != "constant":
            raise _unsupported("padding of batches, cropping, or padding other than by a constant")
        before, after = widths[4:] or (0, 0)
        if signal.units is None:
            return signal
        return _Signal([*self.new(before), *signal.units, *self.new(after)], "map")

    # --- the result ---

    def spec(self) -> PermutationSpec:
        groups = self.groups()
        axes: dict[str, list[Axis]] = defaultdict(list)
        for (tensor, dim), units in self.axes.items():
            positions_of: dict[int, list[int]] = defaultdict(list)
            for position, unit in enumerate(units or ()):
                positions_of[self.find(unit)].append(position)
            positions = {
                name: torch.tensor([positions_of[u] for u in members])
                for name, members in groups.items()
                if members[0] in positions_of
            }
            if positions:
                axes[tensor].append(Axis(dim, positions))
        return PermutationSpec(
            {name: len(members) for name, members in groups.items()},
            {tensor: tuple(of_tensor) for tensor, of_tensor in axes.items()},
            frozenset(self.buffers) & frozenset(axes),
        )

    def groups(self) -> dict[str, list[int]]:
        """Name → units that occur equally often at exactly the same places."""
        axes_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        names: dict[int, str] = {}
        for (tensor, _), units in self.axes.items():
            for unit in units or ():
                names.setdefault(self.find(unit), tensor.rpartition(".")[0])
        everywhere = [s.units for s in self.signals.values() if s is not None]
        for axis, units in enumerate([*everywhere, *self.axes.values()]):
            for unit, count in Counter(map(self.find, units or ())).items():
                axes_of[unit].append((axis, count))
        alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for unit in sorted(names):
            if unit != 0:
                alike[tuple(axes_of[unit])].append(unit)
        groups: dict[str, list[int]] = {}
        for members in alike.values():
            if len(members) > 1:
                name = names[members[0]]
                groups[name if name not in groups else f"{name}#{len(groups)}"] = members
        return groups

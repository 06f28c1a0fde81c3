"""Changes of the weights that keep the network's function: layers and units rescaled.

A unit of a hidden layer whose activation is positively homogeneous, f(az) = a f(z) for a > 0 (ReLU,
leaky ReLU, pooling), may have its incoming weights and bias multiplied by a and its outgoing
weights divided by a (Neyshabur et al. 2015, "Path-SGD"; Dinh et al. 2017, "Sharp minima can
generalize"). Behind a normalisation layer with fixed statistics its scale and shift take the place
of the incoming weights.

Which units there are is read from the traced network (`lsa.maths.alignment.units`). Whether their
activation is homogeneous is tried: a change that moves the outputs is no symmetry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lsa.landscape.landscape import Landscape
from lsa.maths.alignment.units import PermutationSpec

ROUNDING = 1e-9  # relative change of an output in float64 that is none
TRIAL = 3.0  # factor with which a group of units is tried; no power of two, which ReLU6 might pass
NORMALISED = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
)

Change = dict[str, list[tuple[int, Tensor, int]]]
"""Parameter → (axis, positions `(n, m)` of the units on it, +1 where multiplied, −1 divided)."""


def rescalings(landscape: Landscape, theta: Tensor, spec: PermutationSpec) -> dict[str, Change]:
    """Group of hidden units → how to rescale them; those without such a symmetry are left out.

    Args:
        landscape: In float64.
        theta: θ `(d,)`, at which each rescaling is tried on the landscape's samples.
        spec: The network's groups of units.
    """
    changes = {}
    for group, n in spec.sizes.items():
        for change in _candidates(landscape, spec, group):
            factors = torch.full((n,), TRIAL, dtype=theta.dtype)
            for trial in (factors, 1 / factors):
                other = rescaled(landscape, theta, {group: change}, {group: trial})
                if not function_change(landscape, theta, landscape, other) <= ROUNDING:
                    break
            else:
                changes[group] = change
                break
    return changes


def _candidates(landscape: Landscape, spec: PermutationSpec, group: str) -> Iterator[Change]:
    """Scale what makes the units and unscale what takes them: layers first, then normalisation."""
    modules = dict(landscape.model.named_modules())
    trainable = landscape.unflatten(torch.empty(landscape.dimension))
    for kinds in ((nn.Conv2d, nn.Linear), NORMALISED):
        change: Change = {}
        signs = set()
        for name, axes in spec.axes.items():
            owner, _, key = name.rpartition(".")
            for axis in axes:
                makes = axis.dim == 0 and key in ("weight", "bias")
                if group not in axis.positions or (makes and not isinstance(modules[owner], kinds)):
                    continue
                if name in trainable and (makes or axis.dim == 1):
                    sign = 1 if makes else -1
                    change.setdefault(name, []).append((axis.dim, axis.positions[group], sign))
                    signs.add(sign)
        if signs == {1, -1}:
            yield change


def rescaled(
    landscape: Landscape,
    theta: Tensor,
    changes: Mapping[str, Change],
    factors: Mapping[str, Tensor],
) -> Tensor:
    """θ `(d,)` with the units of every group scaled.

    Args:
        landscape: Of the network.
        theta: θ `(d,)`.
        changes: Group → how to rescale its units, from `rescalings`.
        factors: Group → factor of each unit, `(n,)`.
    """
    tensors = {name: value.clone() for name, value in landscape.unflatten(theta).items()}
    for group, change in changes.items():
        for name, axes in change.items():
            for axis, positions, sign in axes:
                scale = torch.ones(tensors[name].shape[axis], dtype=theta.dtype)
                scale[positions] = (factors[group] ** sign).unsqueeze(1).to(theta.dtype)
                shape = [1] * tensors[name].ndim
                shape[axis] = -1
                tensors[name] *= scale.view(shape).to(theta.device)
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def function_change(a: Landscape, theta_a: Tensor, b: Landscape, theta_b: Tensor) -> float:
    """Largest difference of an output between two networks, over the largest output.

    Args:
        a: The landscape of one network, on whose samples both are compared.
        theta_a: Its θ `(d,)`.
        b: The landscape of the other.
        theta_b: Its θ.
    """
    largest = difference = 0.0
    with torch.no_grad():
        for x in a.x.split(a.chunk):
            outputs = a.outputs(theta_a, x)
            gap = (outputs - b.outputs(theta_b, x)).abs().max()
            largest = max(largest, outputs.abs().max().item())
            difference = max(difference, gap.nan_to_num(nan=torch.inf).item())
    return difference / largest if largest else difference

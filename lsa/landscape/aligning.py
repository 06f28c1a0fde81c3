"""A checkpoint moved along its network's symmetries, to weights that are near another's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.landscape.landscape import Landscape
from lsa.landscape.recognition import symmetries
from lsa.maths.alignment.matching import aligned
from lsa.maths.alignment.permutations import (
    PermutationSpec,
    apply,
    permutation_spec,
    weight_matching,
)
from lsa.maths.alignment.symmetries import Symmetries
from lsa.runtime.errors import InputError


@dataclass(frozen=True)
class Moved:
    """Network B moved along its symmetries: the same function, with weights near A's."""

    end: Tensor  # (d,)
    units_moved: float  # fraction of the units that have another place, or are mixed with others
    converged: bool


def alignable(
    landscape: Landscape, theta: Tensor
) -> tuple[PermutationSpec | Symmetries | None, list[str]]:
    """The changes of the weights that keep a network's function, and notes on those left out.

    Hidden units of convolutional and fully connected networks are read from the traced network
    (Ainsworth et al. 2023), symmetries of transformers from a forward pass (Theus et al. 2025).

    Args:
        landscape: Of the network.
        theta: θ `(d,)`, at which the forward pass is recorded.

    Returns:
        Groups of units, or symmetries; None where neither is known. One note for each part that
        cannot be aligned.
    """
    if getattr(landscape.model, "symmetries", None) is None:
        try:
            spec = permutation_spec(landscape.model)
        except InputError as error:
            refusal = str(error)
        else:
            trainable = landscape.unflatten(theta).keys()
            frozen = [n for n in spec.axes if n not in spec.buffers and n not in trainable]
            if frozen:  # it would have to be renumbered too, but is no part of θ
                return None, [
                    f"no aligned line: {frozen[0]} is frozen, so its units keep their order"
                ]
            return spec, []
    else:
        refusal = ""
    try:
        known = symmetries(landscape, theta)
    except InputError as error:
        return None, ["no aligned line: " + "; ".join(filter(None, (refusal, str(error))))]
    return known, [f"not aligned: {line}" for line in known.left_out]


def align(
    landscape: Landscape,
    spec: PermutationSpec | Symmetries,
    a: Tensor,
    b: Tensor,
    rng: torch.Generator,
) -> Moved:
    """Move θ_B along the network's symmetries so that it lies near θ_A.

    Args:
        landscape: Of the network, which both have.
        spec: From `alignable`.
        a: θ_A `(d,)`.
        b: θ_B `(d,)`.
        rng: Source of the starting points of several runs; the best is kept.

    Raises:
        InputError: A weight is not finite.
    """
    of_a, of_b = landscape.unflatten(a), landscape.unflatten(b)
    if isinstance(spec, Symmetries):
        best = aligned(spec, of_a, of_b, rng)
        end = torch.cat([tensor.reshape(-1) for tensor in best.tensors.values()])
        return Moved(end, best.moved, best.converged)
    matching = weight_matching(spec, of_a, of_b, rng)
    moved = apply(spec, matching.permutations, of_b)
    orders = matching.permutations.values()
    displaced = sum(int((order != torch.arange(len(order))).sum()) for order in orders)
    return Moved(
        end=torch.cat([tensor.reshape(-1) for tensor in moved.values()]),
        units_moved=displaced / max(1, sum(map(len, orders))),
        converged=matching.converged,
    )

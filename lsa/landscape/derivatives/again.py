"""Derivatives of a gradient by torch's own, where they will be differentiated once more.

So it is where a network takes derivatives itself, by its inputs say, as physics-informed ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import grad


def again(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    g: Tensor,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Derivatives of ⟨cotangents, ∂(g·f)/∂inputs⟩ by g and by each input, with a graph.

    Args:
        function: f, of the inputs.
        inputs: Tensors of any shapes, as f takes them.
        g: Cotangent of f, of its shape.
        cotangents: For each input one of its shape, or None.

    Returns:
        For g and then each input a tensor of its shape; None where it needs no derivative.
    """
    chosen = [i for i, t in enumerate(inputs) if t.requires_grad and cotangents[i] is not None]
    with torch.enable_grad():
        values = function(*inputs)
        first = grad(values, [inputs[i] for i in chosen], g, create_graph=True)
        by = [g, *inputs]
        asked = [i for i, t in enumerate(by) if t.requires_grad]
        pairs = [(f, c) for f, c in zip(first, (cotangents[i] for i in chosen), strict=True)]
        pairs = [(f, c) for f, c in pairs if f.requires_grad]
        derivatives: list[Tensor | None] = [None] * len(by)
        if pairs and asked:
            derived = grad(
                [f for f, _ in pairs],
                [by[i] for i in asked],
                [c for _, c in pairs],
                create_graph=True,
                materialize_grads=True,
            )
            for i, t in zip(asked, derived, strict=True):
                derivatives[i] = t
    return derivatives

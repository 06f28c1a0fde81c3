"""Whether θ is what a network computes with: all of it, once, and nothing trainable beside it.

A network may keep a tensor that was computed from a parameter, write into a parameter while it
runs, call the layers of another network, or leave parameters unused when it is evaluated. Then L is
another function of θ than its owner thinks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsa.landscape.shared import kept
from lsa.landscape.weighing import leaves, reach_outside
from lsa.runtime.errors import InputError

if TYPE_CHECKING:
    from lsa.landscape.landscape import Landscape

NAMED = 4  # parameters that a note names


def check_views(model: nn.Module, before: dict[str, list[Any]]) -> None:
    """Check that a forward pass computes anew what were views of parameters.

    Args:
        model: After a pass.
        before: What its attributes held before.

    Raises:
        InputError: One is as it was: it would stand still while θ moves.
    """
    for name, tensors in before.items():
        if any(now is t for now in kept(model, name) for t in tensors if isinstance(t, Tensor)):
            raise InputError(
                f"{name!r} is a view of a parameter that was made once, and would stand still "
                "while θ moves; compute it in forward, or make it the same nn.Parameter"
            )


def check_untouched(few: Landscape, theta: Tensor) -> None:
    """Check that a forward pass leaves θ as it is.

    Args:
        few: The landscape on a few samples.
        theta: θ `(d,)`.

    Raises:
        InputError: It writes into a parameter.
    """
    at = theta.detach().clone()
    few.loss(at)
    same = (at == theta) | (at.isnan() & theta.isnan())
    if not bool(same.all()):
        sizes = few.network.sizes
        changed = [
            name
            for name, part in zip(few.network.names, same.split(sizes), strict=True)
            if not bool(part.all())
        ]
        raise InputError(
            f"the forward pass writes into its parameter {changed[0]!r}, as a limit on a norm "
            "does; do that after the steps of the optimizer, and leave it out of the network that "
            "is measured"
        )


def check_alone(few: Landscape, theta: Tensor) -> None:
    """Check that the loss depends on no trainable tensor but θ.

    Args:
        few: The landscape on a few samples.
        theta: θ `(d,)`.

    Raises:
        InputError: It does: a forward that was replaced or a hook calls layers of another network.
    """
    if few.network.keeps_others:
        return
    outside = []
    for _ in range(2):
        with torch.enable_grad(), few.network.at(theta.detach()):
            losses = [part.loss(theta.detach()) for part in few.data.parts(few.network)]
            outside.append(leaves(torch.stack(losses).sum()))
    if reach_outside(*outside):
        raise InputError(
            "the loss depends on trainable tensors that are no parameters of the network, whose "
            "part of the gradient would be left out: a forward or a hook that was replaced calls "
            "the layers of another network (a copy keeps it), or tensors lie in a plain list"
        )


def without_influence(landscape: Landscape, theta: Tensor) -> str:
    """A note that names the parameters without influence on the loss at θ `(d,)`; "" for none."""
    network = landscape.network
    waiting = set(range(len(network.names)))
    for part in landscape.data.parts(network):
        t = theta.detach().requires_grad_()
        with torch.enable_grad(), network.at(t):
            value = part.loss(t)
            values = network.values
            if not value.requires_grad:
                continue
            slopes = torch.autograd.grad(value, values, allow_unused=True)
        waiting -= {i for i, slope in enumerate(slopes) if slope is not None}
        if not waiting:
            return ""
    names = [network.names[i] for i in sorted(waiting)]
    count = sum(network.sizes[i] for i in waiting)
    listed = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    return (
        f"the loss does not depend on {count} of {sum(network.sizes)} parameters ({listed}): their "
        "gradient and curvature are zero; a network that merges or keeps weights when it is "
        "evaluated has such"
    )

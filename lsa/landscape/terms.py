"""The loss terms of one batch, which an objective returns, and the checks on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lsa.landscape.network import HALF
from lsa.runtime.errors import InputError


@dataclass(frozen=True)
class Terms:
    """Loss terms of one batch: L = Σ total / Σ weight + penalty over the batches of a data set.

    The units of weight are whatever the mean runs over: samples, tokens, pixels, class weights.
    """

    total: Tensor  # (): the loss summed over the batch's units of weight
    weight: Tensor | float  # how much weight that is; must not depend on θ
    samples: Tensor | None = None  # (n,): the same sum per sample; None where samples interact
    weights: Tensor | None = None  # (n,): their weights; None: equal
    penalty: Tensor | None = None  # (): counted once, not averaged (a weight decay in the loss)
    outputs: Any = None  # pytree of tensors on the way to `total`, for a Gauss–Newton part


Objective = Callable[[nn.Module, Any], Terms]
"""`(model, batch) → Terms`; the model has θ inside."""


def checked(terms: Terms) -> Terms:
    """Terms, if they fit together.

    Raises:
        InputError: Another type, a total that is no scalar, or samples and weights of other shapes.
    """
    if not isinstance(terms, Terms):
        raise InputError(f"the objective returned a {type(terms).__name__}; return lsa.Terms")
    if terms.total.ndim:
        raise InputError(f"Terms.total has shape {tuple(terms.total.shape)}; sum it to a scalar")
    if any(isinstance(w, Tensor) and w.requires_grad for w in (terms.weight, terms.weights)):
        raise InputError(
            "Terms.weight depends on the network's parameters, and its part of the gradient would "
            "be left out; detach it if it is meant to stand still, else put it into the total"
        )
    if terms.samples is None:
        return terms
    if terms.samples.requires_grad and not terms.total.requires_grad:
        raise InputError("Terms.total is detached from the network; give samples.sum()")
    if terms.samples.ndim != 1:
        raise InputError(
            f"Terms.samples has shape {tuple(terms.samples.shape)}; give one sum per sample, (n,)"
        )
    if terms.weights is not None and terms.weights.shape != terms.samples.shape:
        raise InputError(
            f"Terms.weights has shape {tuple(terms.weights.shape)}, samples "
            f"{tuple(terms.samples.shape)}; give as many of each"
        )
    if terms.total.dtype in HALF:  # which has three digits for a sum
        return replace(terms, total=terms.samples.float().sum())
    return terms


def with_penalty(terms: Terms) -> Tensor:
    """A scalar that depends on every tensor that L depends on."""
    return terms.total if terms.penalty is None else terms.total + terms.penalty


def check_sum(terms: Terms) -> None:
    """Check that the samples add up to the total.

    Raises:
        InputError: They differ from it by more than a thousandth.
    """
    if terms.samples is None:
        return
    own, added = float(terms.total), float(terms.samples.double().sum())
    if abs(own - added) > 1e-3 * max(abs(own), abs(added), 1e-30):
        raise InputError(
            f"Terms.samples add up to {added:.6g}, Terms.total is {own:.6g}; samples are the parts "
            "that the total is the sum of"
        )


def unit_sums(terms: Terms) -> Tensor:
    """The loss of each unit, `(units,)`."""
    return terms.total.reshape(1) if terms.samples is None else terms.samples


def unit_weights(terms: Terms) -> Tensor:
    """The weight of each unit, `(units,)`, in float64."""
    weight = torch.as_tensor(terms.weight, device=terms.total.device).detach().double()
    if terms.samples is None:
        return weight.reshape(1)
    if terms.weights is not None:
        return terms.weights.detach().double()
    n = len(terms.samples)
    return (weight / n).expand(n)

"""Products of curvature and noise matrices of L(θ) = ∑ₖ wₖ Lₖ(θ) with vectors.

The parts Lₖ are the chunks of a split. Products are reverse mode through graphs that outlive one
product: what does not depend on the vector, the forward and the first backward pass, is
computed once for as many parts as fit a given memory, and again at every product for the others.
What is kept changes no number. On a GPU a product is recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

from lsa.landscape.derivatives import sample_gradients
from lsa.landscape.derivatives.layer_gradients import SampleGradients, size
from lsa.landscape.derivatives.modes import (
    Function,
    Matvec,
    differentiable,
    double_backward,
    pull_back,
)
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.replay import replayed
from lsa.landscape.derivatives.second_order import SecondOrder

Graph = TypeVar("Graph")


@dataclass(frozen=True)
class Part:
    """One chunk of a split, as functions of θ `(d,)`."""

    weight: float  # wₖ; they sum to one
    samples: int  # n
    loss: Function  # Lₖ(θ), scalar
    losses: Function  # ℓᵢ(θ) of its samples, `(n,)`
    outputs: Function  # f(θ, xᵢ), `(n, …)`
    loss_of: Function  # Lₖ as a function of the outputs


def hessian(parts: Sequence[Part], theta: Tensor, memory: int) -> Matvec:
    """v ↦ H v with H = ∇²L; `(d,)` or `(d, b)`.

    Args:
        parts: Of the split.
        theta: Where.
        memory: Bytes that may be kept.
    """
    multiply = _kept(lambda k: double_backward(parts[k].loss, theta), memory, _weighed)

    @full_float32()
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        columns = v.to(theta.dtype).reshape(len(v), -1).unbind(1)
        total = torch.zeros(len(columns), len(v), dtype=torch.float64, device=v.device)
        for k, part in enumerate(parts):
            matvec = multiply(k)
            for sum_, column in zip(total, columns, strict=True):
                sum_.add_(matvec(column), alpha=part.weight)
        return total.T.reshape(v.shape).to(v.dtype)

    return replayed(product, theta.device)


@torch.enable_grad()
def saved(function: Function, theta: Tensor) -> int:
    """Bytes that a pass through the function saves for its gradient, θ itself left out."""
    t = theta.detach().requires_grad_()
    return max(1, _weighed(lambda: function(t))[1] - t.nbytes)


@torch.enable_grad()
def graph_size(part: Part, theta: Tensor) -> int:
    """Bytes that `hessian` keeps of a part."""
    return _weighed(lambda: double_backward(part.loss, theta))[1]


def gauss_newton(parts: Sequence[Part], theta: Tensor, memory: int) -> Matvec:
    """v ↦ G v with G = ∑ₖ wₖ Jₖᵀ ∇²Lₖ Jₖ, J and ∇² by the outputs; v is `(d,)`."""

    jacobian = _kept(lambda k: _Jacobian(parts[k].outputs, theta), memory, _weighed)

    def curved(k: int, v: Tensor) -> Tensor:
        J = jacobian(k)
        o = J.value.detach().requires_grad_()
        (g,) = grad(parts[k].loss_of(o), o, create_graph=True)
        return J.pull(pull_back(g, o, J.push(v)))

    return _summed(parts, theta, curved)


def second_moment(
    parts: Sequence[Part], theta: Tensor, memory: int, *, by_layers: bool
) -> tuple[Matvec, Callable[[], Tensor]]:
    """v ↦ 1/N ∑ᵢ gᵢ gᵢᵀ v over the per-sample gradients gᵢ = ∇ℓᵢ(θ), v `(d,)`, and their mean.

    Args:
        parts: Of the split.
        theta: Where.
        memory: Bytes that may be kept.
        by_layers: Take the gᵢ of each layer as `sample_gradients` does, which then
            must know them all. Kept as rows where memory holds all of them, else as the layers have
            them.
    """
    jacobian: Callable[[int], SampleGradients | _Jacobian]
    if by_layers:
        rows = sum(part.samples for part in parts) * theta.nbytes
        build = layered if rows > memory else _in_rows
        jacobian = _kept(lambda k: build(parts[k].losses, theta), memory, _held)
    else:
        jacobian = _kept(lambda k: _Jacobian(parts[k].losses, theta), memory, _weighed)

    @full_float32()
    @torch.enable_grad()
    def mean() -> Tensor:
        total = torch.zeros_like(theta, dtype=torch.float64)
        for k, part in enumerate(parts):
            each = theta.new_full((part.samples,), 1 / part.samples)
            total.add_(jacobian(k).pull(each), alpha=part.weight)
        return total.to(theta.dtype)

    def averaged(k: int, v: Tensor) -> Tensor:
        return jacobian(k).normal(v) / parts[k].samples

    return _summed(parts, theta, averaged), mean


def _summed(
    parts: Sequence[Part], theta: Tensor, multiply: Callable[[int, Tensor], Tensor]
) -> Matvec:
    """v ↦ ∑ₖ wₖ Mₖ v, and `multiply` is (k, v) ↦ Mₖ v."""

    @full_float32()
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v, dtype=torch.float64)
        for k, part in enumerate(parts):
            total.add_(multiply(k, v.to(theta.dtype)), alpha=part.weight)
        return total.to(v.dtype)

    return replayed(product, theta.device)


def layered(losses: Function, theta: Tensor) -> SampleGradients:
    """A part's per-sample gradients, where `sample_gradients` has them."""
    found = sample_gradients.of(losses, theta)
    if found is None:
        raise ValueError("these gradients are not known by layers")
    return found


def _in_rows(losses: Function, theta: Tensor) -> SampleGradients:
    """Those of `layered`, held as one row a sample: a product then only reads them."""
    return layered(losses, theta).in_rows()


@full_float32()
@torch.enable_grad()
def second_derivatives(losses: Function, n: int, like: Tensor) -> Tensor:
    """Second derivatives d²ℓᵢ(α)/dα² at α = 0 of n losses of one scalar, `(n,)`.

    Three reverse passes: two in α of ∑ wᵢℓᵢ, one in w. Forward mode applied twice would be the
    shorter way, but is silently wrong for layer norm (seen in torch 2.14).
    """
    alpha = like.new_zeros(()).requires_grad_()
    w = like.new_ones(n).requires_grad_()
    (slope,) = grad(w @ losses(alpha), alpha, create_graph=True)
    (second,) = grad(slope, alpha, create_graph=True, materialize_grads=True)
    return pull_back(second, w, torch.ones_like(second))


class _Jacobian:
    """f(θ) and the products of its Jacobian J with vectors, from one graph.

    h(w) = Jᵀw is linear in w, so its derivative along v is J v whatever w is (Townsend 2017).
    Forward mode would need the forward pass anew for every v.
    """

    def __init__(self, function: Function, theta: Tensor) -> None:
        self._theta = theta.detach().requires_grad_()
        with SecondOrder(linear=True, values=False):
            self.value = function(self._theta)
        self._w = torch.zeros_like(self.value).requires_grad_()
        self._h = differentiable(grad(self.value, self._theta, self._w, create_graph=True)[0])

    def push(self, v: Tensor) -> Tensor:
        """J v, in the shape of f(θ)."""
        return pull_back(self._h, self._w, v)

    def pull(self, w: Tensor) -> Tensor:
        """Jᵀ w, `(d,)`."""
        return pull_back(self.value, self._theta, w)

    def normal(self, v: Tensor) -> Tensor:
        """JᵀJ v, `(d,)`."""
        return self.pull(self.push(v))


def _kept(
    build: Callable[[int], Graph],
    memory: int,
    weighed: Callable[[Callable[[], Graph]], tuple[Graph, int]],
) -> Callable[[int], Graph]:
    """`build`, each k remembered while the bytes that all hold, as `weighed` says, fit `memory`."""
    kept: dict[int, Graph] = {}
    left = memory

    def graph(k: int) -> Graph:
        nonlocal left
        if k in kept:
            return kept[k]
        if left <= 0:
            return build(k)
        made, size = weighed(lambda: build(k))
        left -= size
        if left >= 0:
            kept[k] = made
        return made

    return graph


def _weighed(build: Callable[[], Graph]) -> tuple[Graph, int]:
    """A graph, and the bytes that it holds for its backward pass."""
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.detach())
        return held[-1]  # an output itself would hold the node that holds it, for ever

    with saved_tensors_hooks(note, lambda tensor: tensor):
        made = build()
    return made, size(held)


def _held(build: Callable[[], SampleGradients]) -> tuple[SampleGradients, int]:
    """Per-sample gradients, and the bytes that they hold."""
    made = build()
    return made, made.nbytes

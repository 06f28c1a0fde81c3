"""Jacobians of losses and outputs by θ, as graphs or as rows of per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from lsa.landscape.derivatives import sample_gradients
from lsa.landscape.derivatives.layer_gradients import SampleGradients
from lsa.landscape.derivatives.modes import (
    Function,
    check_differentiable,
    differentiable,
    pull_back,
)
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.second_order import SecondOrder
from lsa.runtime.errors import InputError

ADJOINT = 1e-2  # of ⟨Jᵀw, v⟩, relative to its usual size; rounding of float32 is far below
ROUNDINGS = 20  # of a product, where those of half precision are more
AGREEMENT = 1e-3  # of a gradient and its way through the outputs, relative; rounding is far below


@full_float32()
@torch.enable_grad()
def second_derivatives(losses: Function, n: int, like: Tensor) -> Tensor:
    """Second derivatives d²ℓᵢ(α)/dα² at α = 0 of n losses of one scalar, `(n,)`.

    Three reverse passes: two in α of ∑ wᵢℓᵢ, one in w. Forward mode applied twice would be the
    shorter way, but is silently wrong for layer norm (seen in torch 2.14).

    Args:
        losses: α `()` ↦ ℓᵢ(α) `(n,)`.
        n: Number of losses.
        like: A tensor of the precision and device of α.

    Raises:
        InputError: An operation cannot be differentiated as often.
    """
    alpha = like.new_zeros(()).requires_grad_()
    w = like.new_ones(n).requires_grad_()
    (slope,) = grad(w @ losses(alpha).to(w), alpha, create_graph=True, materialize_grads=True)
    (second,) = grad(differentiable(slope), alpha, create_graph=True, materialize_grads=True)
    return pull_back(differentiable(second), w, torch.ones_like(second))


def jacobian(losses: Function, theta: Tensor, *, check: bool = True) -> SampleGradients | Jacobian:
    """The Jacobian of losses as a graph; as rows where a gradient has no derivative or a wrong one.

    Args:
        losses: θ `(d,)` ↦ ℓᵢ(θ) `(n,)`.
        theta: θ.
        check: False: a graph of the same network was checked before.
    """
    try:
        made = Jacobian(losses, theta)
        if not check or is_adjoint(made, theta):
            return made
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, InputError):
        pass
    return sample_gradients.one_by_one(losses, theta)


def is_adjoint(jacobian: Jacobian | Traced, theta: Tensor) -> bool:
    """Whether J v is that of Jᵀw, which is autograd's gradient: ⟨w, J v⟩ = ⟨Jᵀw, v⟩.

    It is not where a hook or a custom function computes gradients of which no derivative is right,
    as in deep equilibrium networks.

    Args:
        jacobian: A Jacobian as a graph.
        theta: θ `(d,)`.
    """
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(len(theta), generator=rng).to(theta)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng).to(like)

    def pushed(v: Tensor) -> list[Tensor]:
        return jacobian.push(v) if isinstance(jacobian, Traced) else [jacobian.push(v)]

    steps = pushed(v)
    w = [drawn(step) for step in steps]
    pulled = jacobian.pull(w) if isinstance(jacobian, Traced) else jacobian.pull(w[0])
    by_push = sum(float((a.conj() * s).real.sum()) for a, s in zip(w, steps, strict=True))
    by_pull = float(pulled @ v)
    # A product with 3 v is rounded anew, so it differs from 3 J v by what rounding leaves.
    apart = [(b / 3 - s).abs().square().sum() for b, s in zip(pushed(3 * v), steps, strict=True)]
    rounding = float(sum(apart)) ** 0.5
    usual = float(pulled.norm())  # ⟨Jᵀw, v⟩ is about as large
    return not abs(by_push - by_pull) > max(ADJOINT * usual, ROUNDINGS * rounding)


class Jacobian:
    """f(θ) and the products of its Jacobian J with vectors, from one graph.

    h(w) = Jᵀw is linear in w, so its derivative along v is J v whatever w is (Townsend 2017).
    Forward mode would need the forward pass anew for every v.
    """

    def __init__(self, function: Function, theta: Tensor) -> None:
        self._theta = theta.detach().requires_grad_()
        with SecondOrder(linear=True, values=False):
            self.value = function(self._theta)
        self._w = torch.zeros_like(self.value).requires_grad_()
        if not self.value.requires_grad:  # it does not depend on θ
            self._h = torch.zeros_like(theta)
            return
        self._h = differentiable(
            grad(self.value, self._theta, self._w, create_graph=True, materialize_grads=True)[0]
        )

    def push(self, v: Tensor) -> Tensor:
        """J v, in the shape of f(θ)."""
        return pull_back(self._h, self._w, v)

    def pull(self, w: Tensor) -> Tensor:
        """Jᵀ w, `(d,)`."""
        return pull_back(self.value, self._theta, w)

    def normal(self, v: Tensor) -> Tensor:
        """JᵀJ v, `(d,)`."""
        return self.pull(self.push(v))


class Traced:
    """Gauss–Newton products of a loss that is known only as a function of θ.

    Its outputs are inner nodes of the graph: the loss is differentiated by them, and they by θ.
    """

    def __init__(self, part: Part, theta: Tensor) -> None:
        self._theta = theta.detach().requires_grad_()
        with SecondOrder():
            loss, _, self._outputs = part.traced(self._theta)
        self._g = grad(loss, self._outputs, create_graph=True, materialize_grads=True)
        check_differentiable(self._g)
        self._w = [torch.zeros_like(o).requires_grad_() for o in self._outputs]
        h = grad(self._outputs, self._theta, self._w, create_graph=True, materialize_grads=True)[0]
        self._h = differentiable(h)

    def push(self, v: Tensor) -> list[Tensor]:
        """J v, one tensor for each output."""
        return [*grad(self._h, self._w, v, retain_graph=True, materialize_grads=True)]

    def pull(self, w: list[Tensor]) -> Tensor:
        """Jᵀ w, `(d,)`, of one tensor for each output."""
        return grad(self._outputs, self._theta, w, retain_graph=True, materialize_grads=True)[0]

    def curved(self, v: Tensor) -> Tensor:
        """Jᵀ∇²L J v, `(d,)`."""
        steps = self.push(v)
        pairs = [pair for pair in zip(self._g, steps, strict=True) if pair[0].requires_grad]
        if not pairs:  # a loss that is linear in the outputs
            return torch.zeros_like(v)
        g, m = zip(*pairs, strict=True)
        curved = grad(g, self._outputs, m, retain_graph=True, materialize_grads=True)
        return self.pull([*curved])


@full_float32()
@torch.enable_grad()
def check_outputs(part: Part, theta: Tensor) -> None:
    """Check that the loss depends on θ through its outputs alone, and through each once.

    The gradient by θ must be the one by the outputs, pulled back. Random weights of the samples
    keep it from zero where the gradient of their mean is.

    Args:
        part: Samples whose losses and outputs can be traced.
        theta: θ `(d,)`.

    Raises:
        InputError: It is not, so there is no Gauss–Newton part by these outputs.
    """
    t = theta.detach().requires_grad_()
    _, losses, outputs = part.traced(t)
    if not losses.requires_grad:
        return
    w = torch.randn(len(losses), generator=torch.Generator().manual_seed(0)).to(losses)
    value = w @ losses
    g = grad(value, outputs, retain_graph=True, materialize_grads=True)
    through = grad(outputs, t, g, retain_graph=True, materialize_grads=True)[0]
    whole = grad(value, t, materialize_grads=True)[0]
    size = max(float(whole.norm()), float(through.norm()))
    off = float((whole - through).norm()) / size if size else 0.0
    if off > AGREEMENT:
        raise InputError(
            f"the gradient through Terms.outputs is {off:.1%} off that of the loss; outputs are "
            "all tensors that the loss is computed from, none of them made from another"
        )


@full_float32()
@torch.enable_grad()
def traced_curvatures(part: Part, theta: Tensor, u: Tensor) -> Tensor:
    """Per-sample (Jᵢu)ᵀ∇²ℓᵢ(Jᵢu) `(n,)` where losses are known only as functions of θ.

    Args:
        part: Samples whose losses and outputs can be traced.
        theta: θ `(d,)`.
        u: Direction `(d,)`.
    """
    steps = Traced(part, theta).push(u)
    _, losses, outputs = part.traced(theta.detach().requires_grad_())
    w = losses.new_ones(len(losses)).requires_grad_()

    def slope_of(value: Tensor) -> Tensor:
        slopes = grad(value, outputs, create_graph=True, materialize_grads=True)
        return sum(((s * m).sum() for s, m in zip(slopes, steps, strict=True)), value.new_zeros(()))

    slope = slope_of(w @ losses)
    if not slope.requires_grad:
        return torch.zeros_like(losses)
    second = slope_of(slope)
    return pull_back(second, w, torch.ones_like(second))

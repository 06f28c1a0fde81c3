"""Hessian products by double backward, and derivatives along a direction by forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import jvp

from lsa.landscape.derivatives.second_order import SecondOrder
from lsa.runtime.errors import InputError

Function = Callable[[Tensor], Tensor]
Matvec = Callable[[Tensor], Tensor]
AddProduct = Callable[[Tensor, Tensor, bool], None]
# In the names of the nodes by which PyTorch marks what cannot be differentiated again.
MARKS = ("autograd::Error", "NotImplemented")


def double_backward(loss: Function, theta: Tensor) -> Matvec:
    """v ↦ H v, `(d,)`, by a reverse pass through a reverse pass (Pearlmutter 1994).

    One graph serves every v. With layers of our own (`second_order`) a convolution takes eight of
    its kind, six from the second product on.

    Args:
        loss: L, θ `(d,)` ↦ `()`.
        theta: θ.

    Raises:
        InputError: An operation has no second derivative.
    """
    t = theta.detach().requires_grad_()
    with SecondOrder(values=False):
        value = loss(t)
    return partial(pull_back, differentiable(gradient(value, t, create_graph=True)), t)


def double_backward_by_parts(
    loss: Function, theta: Tensor, leaves: Callable[[], Sequence[Tensor]]
) -> AddProduct:
    """The same as (v, total, retain) ↦ nothing: Hv `(d,)` is added to the total where it arises.

    Nothing else as long as θ is made. Where the graph need not be retained for another product, it
    is freed on the way, as fast as the derivatives by its activations take memory.

    Args:
        loss: Of θ.
        theta: θ `(d,)`.
        leaves: What stood for the parts of θ in the last pass.

    Raises:
        InputError: An operation has no second derivative.
    """
    with SecondOrder(values=False):
        value = loss(theta)
    parts = leaves()
    gradients: Sequence[Tensor] = ()
    if value.requires_grad:
        gradients = grad(value, parts, create_graph=True, materialize_grads=True)
    sizes = [p.numel() for p in parts]
    curved = [(i, g) for i, g in enumerate(gradients) if g.requires_grad]
    check_differentiable([g for _, g in curved])

    def add(v: Tensor, total: Tensor, retain: bool) -> None:
        v_parts = v.split(sizes)
        for part, own in zip(parts, total.split(sizes), strict=True):
            part.grad = own.view_as(part)
        cotangents = [v_parts[i].view_as(parts[i]) for i, _ in curved]
        if curved:
            given = [g for _, g in curved]
            torch.autograd.backward(given, cotangents, retain_graph=retain, inputs=list(parts))
        for part in parts:
            part.grad = None

    return add


def gradient(
    value: Tensor, at: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensor:
    """∂value/∂at, of the shape of `at`; zero where the value does not depend on it.

    Args:
        value: A scalar `()` with a graph.
        at: A tensor that needs a gradient, such as θ.
        create_graph: Whether the gradient will be differentiated.
        retain_graph: Whether the graph is used again; default: where it is differentiated.
    """
    if not value.requires_grad:
        return torch.zeros_like(at)
    options: Any = {"create_graph": create_graph, "retain_graph": retain_graph}
    return grad(value, at, materialize_grads=True, **options)[0]


def directional_derivative(function: Function, theta: Tensor, v: Tensor) -> Tensor:
    """Derivative of a function at θ along v, of the shape of its value, by forward mode.

    Args:
        function: Of θ `(d,)`.
        theta: θ.
        v: Direction `(d,)`.

    Raises:
        RuntimeError: An operation has no derivative by forward mode.
    """
    with warnings.catch_warnings():  # of PyTorch's own, at its first call
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        value, slope, *_ = jvp(function, (theta,), (v,))
        # It makes float64 of a Python number times a tensor without dimensions.
        return slope.to(value.dtype)


def pull_back(g: Tensor, at: Tensor, cotangent: Tensor) -> Tensor:
    """∂(g·cotangent)/∂at, of the shape of `at`; zero where g does not depend on it.

    The graph is retained.

    Args:
        g: A tensor with a graph, such as a gradient.
        at: A tensor that needs a gradient.
        cotangent: Of the shape of g.
    """
    if not g.requires_grad:
        return torch.zeros_like(at)
    return grad(g, at, cotangent, retain_graph=True, materialize_grads=True)[0]


def differentiable(g: Tensor) -> Tensor:
    """g itself, of any shape; checked by `check_differentiable`."""
    check_differentiable([g])
    return g


def check_differentiable(gradients: Sequence[Tensor]) -> None:
    """Check that PyTorch marks no part of the graphs of gradients as differentiable no more.

    PyTorch says so only when it gets there, and `autograd.grad` does not: what
    `once_differentiable` returns is tied to no input, so its part of the derivative would be left
    out in silence.

    Args:
        gradients: Tensors of any shape. What their graphs share is looked at once.

    Raises:
        InputError: It marks one; names it.
    """
    seen, waiting = set(), [g.grad_fn for g in gradients]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        name = node.name()
        if any(mark in name for mark in MARKS):
            raise InputError(
                f"an operation of the network has no second derivative ({name} in the graph "
                "of its gradient), so exact products need another in its place"
            )
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]

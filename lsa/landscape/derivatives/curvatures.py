"""Curvatures uᵀ∇²ℓᵢ(θ)u of independent samples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, grad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lsa.landscape.derivatives.convolution import DIMENSIONS, convolution_geometry
from lsa.landscape.derivatives.jacobians import second_derivatives
from lsa.landscape.derivatives.layer_gradients import Convolution, Linear
from lsa.landscape.derivatives.modes import differentiable, pull_back
from lsa.landscape.derivatives.sample_gradients import LAYERS, SAME_SAMPLES, drawn_weights
from lsa.landscape.derivatives.second_order import SecondOrder

Losses = Callable[[Tensor], Tensor]


@torch.enable_grad()
def by_layers(losses: Losses, theta: Tensor, u: Tensor, n: int) -> Tensor | None:
    """Curvatures by a step along u of each sample's own, where `sample_gradients` has them.

    A layer is linear in its parameters, so at θ + αᵢu it is what it is at θ, and αᵢ times what it
    is at u. The loss of a sample then depends on its own αᵢ alone, and two reverse passes give all
    d²ℓᵢ/dαᵢ². A third, of weighted losses, checks the order of the samples. None of them computes
    the gradient of a weight.

    Args:
        losses: θ `(d,)` ↦ ℓᵢ(θ) `(n,)`.
        theta: θ.
        u: Direction `(d,)`.
        n: Number of samples.

    Returns:
        uᵀ∇²ℓᵢ(θ)u, `(n,)`. None where the network reorders its samples: slopes of weighted losses
        are then not those of the losses, weighted.

    Raises:
        InputError: An operation has no second derivative.
    """
    alpha = theta.new_zeros(n).requires_grad_()
    at = theta.detach().clone()
    with SecondOrder(), _Moved(at, u.detach().to(at).contiguous(), alpha):
        values = losses(at)
    weights = drawn_weights(values)
    (weighted,) = grad(values, alpha, weights, retain_graph=True, materialize_grads=True)
    (slopes,) = grad(values.sum(), alpha, create_graph=True, materialize_grads=True)
    wanted = weights * slopes.detach()
    if not (weighted - wanted).abs().max() <= SAME_SAMPLES * wanted.abs().max():
        return None
    return pull_back(differentiable(slopes), alpha, torch.ones_like(slopes))


def by_one_step(losses: Losses, theta: Tensor, u: Tensor, n: int) -> Tensor:
    """Curvatures `(n,)` by one step along u that all samples share; for any network.

    Args:
        losses: θ `(d,)` ↦ ℓᵢ(θ) `(n,)`.
        theta: θ.
        u: Direction `(d,)`.
        n: Number of samples.

    Raises:
        InputError: An operation has no third derivative.
    """
    at, direction = theta.detach(), u.to(theta.dtype)
    return second_derivatives(lambda alpha: losses(at + alpha * direction), n, at)


class _Moved(TorchFunctionMode):
    """Within the block, a layer whose parameters are views of θ is for sample i at θ + αᵢu."""

    def __init__(self, theta: Tensor, u: Tensor, alpha: Tensor) -> None:
        super().__init__()
        self._theta, self._u, self._alpha = theta, u, alpha

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The operation itself, or at the samples' own parameters."""
        kwargs = kwargs or {}
        if func not in LAYERS:
            return func(*args, **kwargs)
        call = _signature(func).bind(func, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        w, b = given["weight"], given["bias"]
        if not any(p is not None and p._base is self._theta for p in (w, b)):
            return func(*args, **kwargs)
        if func in DIMENSIONS or func is F.linear:
            forward = functools.partial(func, *args, **kwargs)
            operation, v = _operation(func, given), self._direction(w)
            c = None if b is None else self._direction(b)
            return _Layer.apply(given["input"], self._alpha, forward, operation, w, v, c)
        either = b if w is None else w
        given.update(weight=torch.ones_like(either), bias=torch.zeros_like(either))
        y = func(*call.args[1:], **call.kwargs)  # normalised, neither scaled nor shifted
        if w is not None:
            y = y * self._each(w, func, y)
        return y if b is None else y + self._each(b, func, y)

    def _direction(self, parameter: Tensor) -> Tensor:
        """What of u stands where the parameter stands in θ; zeros for one that is fixed."""
        if parameter._base is not self._theta:
            return torch.zeros_like(parameter)
        geometry = parameter.size(), parameter.stride(), parameter.storage_offset()
        return self._u.as_strided(*geometry)

    def _each(self, p: Tensor, norm: Callable, y: Tensor) -> Tensor:
        """A norm's parameter at θ + αᵢu for each sample, in the dimensions of its outputs y."""
        shape = list(p.shape) if norm is F.layer_norm else [len(p), *[1] * (y.ndim - 2)]
        shape = [1] * (y.ndim - len(shape)) + shape
        alpha = self._alpha.view(-1, *[1] * (y.ndim - 1))
        return p.view(shape) + alpha * self._direction(p).view(shape)


@functools.cache
def _signature(func: Callable) -> inspect.Signature:
    """That of a layer's operation, after the operation itself."""
    return inspect.signature(LAYERS[func])


def _operation(func: Callable, given: dict[str, Any]) -> Linear | Convolution:
    if func is F.linear:
        return Linear(given["weight"].shape)
    geometry = [given[name] for name in ("stride", "padding", "dilation", "groups")]
    return Convolution(given["weight"].shape, convolution_geometry(func, *geometry))


class _Layer(Function):
    """y = (W + αᵢV) x + b + αᵢc, where α is zero: what is multiplied by it is not computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        forward: Callable[[], Tensor],
        operation: Linear | Convolution,
        w: Tensor,
        v: Tensor,
        c: Tensor | None,
    ) -> Tensor:
        y = forward()
        step = operation.outputs(x, v)
        if c is not None:
            step += c if isinstance(operation, Linear) else c.view(-1, *[1] * (y.ndim - 2))
        ctx.save_for_backward(x, alpha, step, w, v)
        ctx.operation = operation
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (g,) = gradients
        results = _Slope.apply(g, *ctx.saved_tensors, ctx.operation, ctx.needs_input_grad[0])
        return *results, None, None, None, None, None


class _Slope(Function):
    """The gradient of a layer: gx = Wᵀg by its input, and by αᵢ what g is along V xᵢ + c."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        alpha: Tensor,
        step: Tensor,
        w: Tensor,
        v: Tensor,
        operation: Linear | Convolution,
        to_x: bool,
    ) -> tuple:
        ctx.save_for_backward(g, x, step, w, v)
        ctx.operation, ctx.to_x = operation, to_x
        ctx.set_materialize_grads(False)
        return operation.inputs(g, x, w) if to_x else None, _inner(g, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple:
        """From cotangents h of gx and s of the slopes."""
        h, s = gradients
        g, x, step, w, v = ctx.saved_tensors
        dg = dx = da = None
        if h is not None:
            dg = ctx.operation.outputs(h, w)
        if s is not None:
            scale = s.view(-1, *[1] * (g.ndim - 1))
            dg = step * scale if dg is None else dg.addcmul_(step, scale)
        if ctx.to_x:
            turned = ctx.operation.inputs(g, x, v)
            da = None if h is None else _inner(turned, h)
            dx = None if s is None else turned.mul_(s.view(-1, *[1] * (x.ndim - 1)))
        return dg, dx, da, None, None, None, None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products `(n,)` of the samples."""
    return (a * b).flatten(1).sum(1)

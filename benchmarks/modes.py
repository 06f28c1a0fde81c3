"""One Hessian product in the modes that PyTorch offers, and with lsa's choice of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from benchmarks import setting
from benchmarks.timing import alternate
from lsa.landscape import flatten
from lsa.landscape.derivatives.modes import Function, Matvec

ROUNDS = 3


def double_backward(loss: Function, theta: Tensor) -> Matvec:
    """With PyTorch's own second derivatives."""

    def product(v: Tensor) -> Tensor:
        t = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(t), t, create_graph=True)
        return torch.autograd.grad(g, t, v)[0]

    return product


def forward_over_reverse(loss: Function, theta: Tensor) -> Matvec:
    """The gradient's derivative along v."""
    return lambda v: jvp(grad(loss), (theta,), (v,))[1]


def reverse_over_forward(loss: Function, theta: Tensor) -> Matvec:
    """The gradient of the derivative along v."""
    return lambda v: grad(lambda t: jvp(loss, (t,), (v,))[1])(theta)


MODES = (double_backward, forward_over_reverse, reverse_over_forward)


def rows(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Per mode, layout of the images and samples per pass: seconds, gradients, difference."""
    at, theta = setting.landscape(model, x, y)
    bare, _ = setting.landscape(model, x, y, memory=0)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    kept, built = at.hessian(theta), bare.hessian(theta)
    whole = len(x)
    tasks: dict[str, Callable[[], Tensor]] = {
        "gradient": lambda: at.gradient(theta),
        f"lsa, graphs kept, passes of {at.chunk}": lambda: kept(v),
        f"lsa, nothing kept, passes of {at.chunk}": lambda: built(v),
    }
    for size in (at.chunk, whole):
        for layout in ("channels last", "contiguous"):
            for mode in MODES if size == at.chunk else MODES[:1]:
                name = f"{mode.__name__.replace('_', ' ')}, {layout}, passes of {size}"
                tasks[name] = partial(_summed, mode, model, x, y, v, size, layout)
    reference = kept(v)
    differences = {
        name: float((task() - reference).norm() / reference.norm()) for name, task in tasks.items()
    }
    seconds = alternate(tasks, ROUNDS)
    return [
        {
            "mode": name,
            "seconds": s,
            "gradients": s / seconds["gradient"],
            "difference": float("nan") if name == "gradient" else differences[name],
        }
        for name, s in seconds.items()
    ]


def _summed(
    mode: Callable[[Function, Tensor], Matvec],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    size: int,
    layout: str,
) -> Tensor:
    """The product on all samples, in passes of a size."""
    last = layout == "channels last" and x.ndim == 4
    x = x.contiguous(memory_format=torch.channels_last) if last else x.contiguous()
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    theta, total = flatten(model).to(x.device), torch.zeros_like(v, dtype=torch.float64)

    def loss(t: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        parts = t.split([shape.numel() for shape in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, weights, (inputs,)), targets)

    for inputs, targets in zip(x.split(size), y.split(size), strict=True):
        part = mode(lambda t, a=inputs, b=targets: loss(t, a, b), theta)(v)
        total.add_(part, alpha=len(inputs) / len(x))
    return total.to(v)

"""Convolution and max pooling against PyTorch's own and finite differences."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from lsa.landscape.derivatives.second_order import SecondOrder

CONVOLUTIONS = {
    "plain": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 3), {}),
    "strided": (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 2), {"stride": 2, "padding": (1, 0)}),
    "dilated": (F.conv2d, (2, 2, 7, 7), (2, 2, 3, 3), {"dilation": 2, "padding": 2}),
    "grouped": (F.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (F.conv2d, (2, 3, 5, 5), (3, 1, 3, 3), {"groups": 3}),
    "same": (F.conv2d, (2, 2, 5, 5), (3, 2, 3, 3), {"padding": "same"}),
    "unbatched": (F.conv2d, (2, 5, 5), (3, 2, 3, 3), {}),
    "1-d": (F.conv1d, (2, 3, 8), (4, 3, 3), {"stride": 2, "padding": 1}),
    "3-d": (F.conv3d, (1, 2, 4, 4, 3), (2, 2, 3, 2, 2), {"padding": 1}),
}
POOLS = {
    "plain": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "ceiled": {"kernel_size": (2, 3), "stride": 2, "ceil_mode": True},
    "dilated": {"kernel_size": 2, "dilation": 2},
}


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_have_the_right_derivatives(name, bias):
    function, x_shape, w_shape, options = CONVOLUTIONS[name]
    inputs = [draw(*x_shape), draw(*w_shape)] + ([draw(w_shape[0])] if bias else [])

    def ours(*args: Tensor) -> Tensor:
        with SecondOrder():
            return function(*args, **options)

    assert torch.equal(ours(*inputs), function(*inputs, **options))
    assert gradcheck(ours, inputs)
    assert gradgradcheck(ours, inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_derivatives_of_gradients_that_are_not_computed_are_right(name, bias):
    function, x_shape, w_shape, options = CONVOLUTIONS[name]
    shapes = [w_shape, (w_shape[0],)] if bias else [w_shape]
    theta, x = draw(sum(math.prod(shape) for shape in shapes)), draw(*x_shape)

    def derivatives(values: bool) -> tuple[Tensor, ...]:
        parts = theta.split([math.prod(shape) for shape in shapes])
        weights = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        with SecondOrder(values=values):
            value = function(x, *weights, **options).sin().sum()
        g_theta, g_x = torch.autograd.grad(value, (theta, x), create_graph=True)
        along = torch.arange(1.0, len(theta) + 1).double()
        return torch.autograd.grad(g_theta @ along + g_x.square().sum(), (theta, x))

    for found, wanted in zip(derivatives(False), derivatives(True), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_has_the_right_derivatives(name, layout):
    x = draw(2, 3, 7, 6).detach().contiguous(memory_format=layout).requires_grad_()

    def ours(x: Tensor) -> Tensor:
        with SecondOrder():
            return F.max_pool2d(x, **POOLS[name])

    assert torch.equal(ours(x), F.max_pool2d(x, **POOLS[name]))
    assert gradcheck(ours, x)
    assert gradgradcheck(ours, x)  # zero but for the path through g


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_needs_no_derivative_gets_none(frozen):
    x, w = draw(2, 3, 6, 5), draw(4, 3, 3, 3)
    (x if frozen == "input" else w).requires_grad_(False)
    wanted = w if frozen == "input" else x
    directions = torch.randn_like(wanted)

    def second(context: bool) -> Tensor:
        with SecondOrder() if context else contextlib.nullcontext():
            value = F.max_pool2d(F.conv2d(x, w).tanh(), 2).square().sum()
        (g,) = torch.autograd.grad(value, wanted, create_graph=True)
        return torch.autograd.grad(g, wanted, directions)[0]

    torch.testing.assert_close(second(True), second(False), rtol=1e-12, atol=1e-12)


def test_rectifiers_have_the_right_derivatives():
    x = draw(3, 5)

    def ours(x: Tensor) -> Tensor:
        with SecondOrder():
            return F.relu(x) * torch.relu(x) * x.relu()  # not linear, so that there is a second one

    assert torch.equal(ours(x), x.relu() ** 3)
    assert gradcheck(ours, x)
    assert gradgradcheck(ours, x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5)])
def test_fixed_batch_norm_has_the_right_derivatives(shape, affine):
    mean, variance = draw(3).detach(), draw(3).detach().square() + 0.1
    inputs = [draw(*shape)] + ([draw(3), draw(3)] if affine else [])

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        with SecondOrder():
            return F.batch_norm(x, mean, variance, *weights, eps=1e-3)

    torch.testing.assert_close(
        ours(*inputs), F.batch_norm(inputs[0], mean, variance, *inputs[1:], eps=1e-3)
    )
    assert gradcheck(ours, inputs)
    assert gradgradcheck(ours, inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_has_the_right_derivatives(groups, layout):
    x = draw(2, 6, 3, 2).detach().contiguous(memory_format=layout).requires_grad_()

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with SecondOrder():
            return F.group_norm(x, groups, w, b, eps=1e-3)

    inputs = [x, draw(6), draw(2, 3).detach().view(6).requires_grad_()]
    assert torch.equal(ours(*inputs), F.group_norm(x, groups, *inputs[1:], eps=1e-3))
    assert gradcheck(ours, inputs)
    assert gradgradcheck(ours, inputs)


def test_group_norm_keeps_its_digits_far_from_zero():
    """A mean of 100 deviations leaves float32 the digits that PyTorch's own way has."""
    x = (draw(4, 8, 6, 6).detach() + 100).requires_grad_()
    w, b, v = draw(8), draw(8), draw(4, 8, 6, 6).detach()

    def product(dtype: torch.dtype, context: bool) -> Tensor:
        at = x.detach().to(dtype).requires_grad_()
        with SecondOrder() if context else contextlib.nullcontext():
            y = F.group_norm(at, 2, w.to(dtype), b.to(dtype))
        (g,) = torch.autograd.grad(y.exp().sum(), at, create_graph=True)
        return torch.autograd.grad(g, at, v.to(dtype))[0].double()

    exact = product(torch.float64, False)
    ours, theirs = ((product(torch.float32, c) - exact).norm() for c in (True, False))
    assert ours < 3 * theirs + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("layer", "node"),
    [
        (nn.Conv2d(3, 3, 3), "_Convolution"),
        (nn.MaxPool2d(2), "_MaxPool"),
        (nn.ReLU(), "_Rectifier"),
        (nn.BatchNorm2d(3).eval(), "Addcmul"),
        (nn.GroupNorm(3, 3), "_GroupNorm"),
    ],
)
def test_modules_take_these_routes(layer, node):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with SecondOrder():
        assert layer(x).grad_fn.name().startswith(node)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3),
        nn.GroupNorm(3, 3, affine=False),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, return_indices=True),
    ],
)
def test_what_has_no_route_is_left_to_pytorch(layer):
    x = torch.randn(2, 3, 4, 4)
    with SecondOrder():
        ours = copy.deepcopy(layer)(x.clone())
    theirs = layer(x.clone())
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_in_place_rectifiers_change_their_input():
    x = torch.randn(5)
    with SecondOrder():
        y = F.relu(x, inplace=True)
    assert y is x and bool((x >= 0).all())


def test_linear_graphs_give_the_same_products_of_the_jacobian():
    x, w, b = draw(2, 3, 6, 5), draw(4, 3, 3, 3), draw(4)
    v, cotangent = torch.randn_like(w), draw(2, 4, 2, 1).detach()

    def products(**options: bool) -> tuple[Tensor, Tensor]:
        with SecondOrder(**options):
            y = F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2)
        zero = torch.zeros_like(y).requires_grad_()
        (h,) = torch.autograd.grad(y, w, zero, create_graph=True)
        (push,) = torch.autograd.grad(h, zero, v, retain_graph=True)
        return push, torch.autograd.grad(y, w, cotangent)[0]

    for ours, theirs in zip(products(linear=True), products(), strict=True):
        assert torch.equal(ours, theirs)

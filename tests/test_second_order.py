"""Convolution and max pooling against PyTorch's own and finite differences."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lsa.second_order import SecondOrder

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

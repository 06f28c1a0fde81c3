"""Second derivatives of a transformer's layers against finite differences and torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from lsa.landscape.derivatives import attention, cross_entropy
from lsa.landscape.derivatives.second_order import SecondOrder


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()


LABELS = torch.tensor([2, 0, -100, 4, 1, 3])
MASK = torch.ones(5, 5, dtype=torch.bool).tril(1)
ADDED = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
UNSEEING = MASK & (torch.arange(5) % 2 == 0)[:, None]
sdpa = F.scaled_dot_product_attention
Q = (normal(2, 2, 5, 3), normal(2, 2, 5, 3, seed=1), normal(2, 2, 5, 2, seed=2))
FEW = (normal(1, 2, 5, 2), normal(1, 2, 5, 2, seed=1), normal(1, 2, 5, 1, seed=2))
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (F.linear, (normal(2, 3, 4), normal(5, 4, seed=1), normal(5, seed=2))),
    "linear, no bias": (F.linear, (normal(3, 4), normal(5, 4, seed=1))),
    "linear, one output": (F.linear, (normal(2, 3, 4), normal(4, seed=1))),
    "linear, no batch": (F.linear, (normal(4), normal(5, 4, seed=1), normal(5, seed=2))),
    "embedding": (
        lambda w: F.embedding(torch.tensor([[0, 2], [2, 1]]), w).tanh(),
        (normal(4, 3),),
    ),
    "attention": (sdpa, Q),
    "causal attention": (lambda *t: sdpa(*t, is_causal=True), Q),
    "masked attention": (lambda *t: sdpa(*t, attn_mask=MASK), Q),
    "attention with an added mask": (lambda *t: sdpa(*t, attn_mask=ADDED, scale=0.3), Q),
    "attention with queries that see nothing": (lambda *t: sdpa(*t, attn_mask=UNSEEING), Q),
    "attention with queries that see nothing, an added mask": (
        lambda *t: sdpa(
            *t, attn_mask=torch.zeros(5, 5).double().masked_fill(~UNSEEING, -torch.inf)
        ),
        Q,
    ),
    "layer norm": (
        lambda x, w, b: F.layer_norm(x, (6,), w, b, 1e-3),
        (normal(3, 2, 6), normal(6, seed=1), normal(6, seed=2)),
    ),
    "rms norm": (
        lambda x, w: F.rms_norm(x, (6,), w, 1e-3),
        (normal(3, 2, 6), normal(6, seed=1)),
    ),
    "gelu": (F.gelu, (normal(3, 4),)),
    "silu": (F.silu, (normal(3, 4),)),
    "hard sigmoid": (lambda x: F.hardsigmoid(3 * x), (normal(3, 4),)),
    "hard sigmoid, in place": (lambda x: F.hardsigmoid(3 * x, inplace=True), (normal(3, 4),)),
    "cross entropy": (
        lambda z: F.cross_entropy(z, LABELS, reduction="none"),
        (normal(6, 5),),
    ),
    "cross entropy, mean": (lambda z: F.cross_entropy(z, LABELS), (normal(6, 5),)),
    "cross entropy of tokens": (
        lambda z: F.cross_entropy(z, LABELS.view(2, 3), reduction="sum"),
        (normal(2, 5, 3),),
    ),
    "cross entropy of what the head reads": (
        lambda h, w: cross_entropy.of_hidden(h, w, LABELS),
        (normal(6, 3), normal(5, 3, seed=1)),
    ),
}


LEAST = torch.finfo(torch.float64).min


def _added(least: float) -> Callable[..., Tensor]:
    """Attention with queries whose keys all have a huge number added: then they see all alike."""
    mask = torch.zeros(5, 5).double().masked_fill(~UNSEEING, least)
    return lambda *t: sdpa(*t, attn_mask=mask)


# Differences are lost in the rounding of the scores.
ROUNDED = {f"attention, {least:g} added": (_added(least), Q) for least in (-1e9, -1e20, LEAST)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks each."""
    monkeypatch.setattr(attention, "BLOCK", 1)
    monkeypatch.setattr(attention, "ROWS", 2)
    monkeypatch.setattr(cross_entropy, "ROWS", 10)


def routed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with SecondOrder():
            return function(*inputs)

    return run


@pytest.mark.parametrize("name", CASES)
def test_both_derivatives_are_those_of_differences(name):
    function, inputs = CASES[name]
    assert gradcheck(routed(function), inputs)
    assert gradgradcheck(routed(function), inputs)


LACKING = [n for n in CASES if "head reads" in n or "hard sigmoid" in n]  # in torch


@pytest.mark.parametrize("name", [n for n in {**CASES, **ROUNDED} if n not in LACKING])
def test_values_and_both_derivatives_are_torchs(name):
    function, inputs = {**CASES, **ROUNDED}[name]
    rng = torch.Generator().manual_seed(3)

    def derivatives(f: Callable[..., Tensor]) -> list[Tensor]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = f(*inputs)
        rng.manual_seed(3)
        g = torch.randn(y.shape, generator=rng, dtype=y.dtype).requires_grad_()
        first = torch.autograd.grad(y, inputs, g, create_graph=True)
        turned = sum((t * t.detach().cos()).sum() for t in first)
        return [y, *first, *torch.autograd.grad(turned, [*inputs, g], materialize_grads=True)]  # pyright: ignore

    for own, theirs in zip(derivatives(routed(function)), derivatives(function), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in CASES if n not in (*LACKING, "embedding")])
def test_outputs_may_be_changed_in_place(name):
    function, inputs = CASES[name]

    def derivatives(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        turned = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(turned, inputs)]  # pyright: ignore

    own = derivatives(routed(function)(*inputs).add_(1).mul_(2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = derivatives(2 * (function(*inputs) + 1))
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_hard_sigmoid_and_its_gradient_are_torchs():
    """Whose sixth is one of float32, in float64 too."""
    x = torch.cat([normal(40).detach() * 3, torch.tensor([-3.0, 3.0]).double()]).requires_grad_()
    for f in (F.hardsigmoid, nn.Hardsigmoid(), lambda x: F.hardsigmoid(x + 0, inplace=True)):
        own, theirs = routed(f)(x), F.hardsigmoid(x)
        torch.testing.assert_close(own, theirs, rtol=6e-8, atol=0)
        (g,), (wanted,) = (torch.autograd.grad(y.sum(), x) for y in (own, theirs))
        torch.testing.assert_close(g, wanted, rtol=6e-8, atol=0)


def test_many_classes_of_what_the_head_reads_are_those_of_all_logits():
    h, w = normal(6, 3), normal(5, 3, seed=1)
    own = cross_entropy.of_hidden(h, w, LABELS)
    torch.testing.assert_close(own, F.cross_entropy(h @ w.T, LABELS, reduction="none"))


@pytest.mark.parametrize("name", [n for n in CASES if n != "embedding"])
def test_a_third_derivative_is_there_for_networks_that_take_one_themselves(name):
    function, inputs = CASES[name]
    if inputs is Q:  # every number of an input is one more direction to differentiate in
        inputs = FEW

    def slope(*inputs: Tensor) -> Tensor:
        y = routed(function)(*inputs)
        found = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.cat([t.flatten() for t in found])

    assert gradgradcheck(slope, inputs)

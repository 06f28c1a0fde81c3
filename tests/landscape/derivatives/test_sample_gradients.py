"""Per-sample gradients by layers against those of `torch.func`, which knows nothing of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from known_layers import KNOWN, Applied, Checkpointed, N, image, losses
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lsa.landscape import flatten
from lsa.landscape.derivatives import layer_gradients, sample_gradients
from lsa.landscape.derivatives.layer_gradients import (
    Convolution,
    Factors,
    HalfRows,
    Linear,
    SampleGradients,
)
from lsa.landscape.derivatives.slabs import Slabs

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("name", KNOWN)
def test_slopes_sums_and_rows_are_those_of_every_sample_alone(name):
    model, shape = KNOWN[name]()
    of, theta = losses(model, torch.randn(shape)), flatten(model)
    found = sample_gradients.of(of, theta)
    assert found is not None
    assert sample_gradients.are_exact(of, theta)
    rows = jacrev(of)(theta)
    v, c = torch.randn(len(theta)), torch.randn(N)
    for held in (found, found.in_rows(), found.compact(Slabs())):
        torch.testing.assert_close(held.rows(), rows)
        torch.testing.assert_close(held.push(v), rows @ v)
        torch.testing.assert_close(held.pull(c), c @ rows)
        torch.testing.assert_close(held.normal(v), (rows @ v) @ rows)


def test_what_does_not_depend_on_theta_has_none_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    x = torch.randn(image())

    def of(theta: Tensor) -> Tensor:
        return functional_call(model, {"3.weight": theta.view(2, 48)}, (x,)).square().sum(1)

    theta = model[3].weight.detach().flatten()
    found = sample_gradients.of(of, theta)
    assert found is not None
    torch.testing.assert_close(found.rows(), jacrev(of)(theta))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        pytest.param(lambda x, w, b: F.linear(x, w) + b, {"w": (3, 4), "b": (3,)}, id="added"),
        pytest.param(lambda x, w: F.linear(x, w.T), {"w": (4, 3)}, id="transposed"),
        pytest.param(lambda x, w: F.linear(x, 2 * w), {"w": (3, 4)}, id="computed"),
        pytest.param(lambda x, w: F.linear(w, x), {"w": (2, 4)}, id="as input"),
        pytest.param(lambda x, w: F.linear(x[0], w)[None], {"w": (3, 4)}, id="one sample"),
    ],
)  # fmt: skip
def test_parameters_that_enter_otherwise_are_not_taken_for_known(function, shapes):
    model = Applied(function, **shapes)
    assert sample_gradients.of(losses(model, torch.randn(N, 4)), flatten(model)) is None


def test_samples_along_another_dimension_are_not_taken_for_the_first():
    """N tokens of N samples, the tokens first: only the numbers tell."""
    model = Applied(lambda x, w: F.linear(x.transpose(0, 1), w).transpose(0, 1), w=(3, 4))
    short, square = torch.randn(N, 2, 4), torch.randn(N, N, 4)
    theta = flatten(model)
    assert sample_gradients.of(losses(model, short), theta) is None
    assert sample_gradients.of(losses(model, square), theta) is not None
    assert not sample_gradients.are_exact(losses(model, square), theta)


def test_a_network_that_computes_parts_of_itself_again_is_left_to_autograd():
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(inner))
    assert not sample_gradients.are_exact(losses(model, torch.randn(N, 4)), flatten(model))


def test_an_input_that_is_changed_afterwards_is_not_kept():
    model = Applied(lambda x, w: F.linear(y := x * 1, w) + y.mul_(2).sum(1, keepdim=True), w=(3, 4))
    assert sample_gradients.of(losses(model, torch.randn(N, 4)), flatten(model)) is None


def test_bytes_count_what_is_shared_once_and_no_more_than_the_samples_own():
    everything = torch.randn(1000, 50)
    model = Applied(lambda x, u, w: F.linear(x, u) * F.linear(x, w), u=(60, 50), w=(60, 50))
    found = sample_gradients.of(losses(model, everything[:N]), flatten(model))
    assert found is not None
    for held in (found, found.compact(Slabs())):
        assert held.nbytes == 8 * N * (50 + 2 * 60)  # the inputs once, δ of each


def test_a_layer_keeps_whatever_is_smaller():
    wide, narrow = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(120, 3, bias=False)
    model = nn.Sequential(wide, nn.Flatten(), narrow)
    found = sample_gradients.of(losses(model, torch.randn(image())), flatten(model))
    assert found is not None
    convolution, linear = sorted(found.layers, key=lambda layer: layer.place.start)
    assert convolution.held[0].shape == (N, 4 * 3 * 9)  # for 6·5·(3 + 4) numbers
    assert [t.shape for t in linear.held] == [(N, 120), (N, 3)]  # for 360


def layer_of_96_weights() -> Factors:
    """With 6·(12 + 8) numbers as factors."""
    a, delta = torch.randn(50, 6, 12), torch.randn(50, 6, 8)
    delta[1], delta[2], delta[3] = 0, 1e-20 * delta[2], 1e-30 * delta[3]
    return Factors(slice(3, 99), Linear(torch.Size((8, 12))), a.float(), delta.float())


def convolution_of_96_weights() -> Factors:
    """With the channels last, whose rows have an order of their own."""
    a, delta = torch.randn(50, 4, 5, 7), torch.randn(50, 6, 5, 6)
    delta[1], delta[2], delta[3] = 0, 1e-20 * delta[2], 1e-30 * delta[3]
    a, delta = (t.float().to(memory_format=torch.channels_last) for t in (a, delta))
    operation = Convolution(torch.Size((6, 4, 2, 2)), ((1, 1), (1, 0), (2, 1), False, [0, 0], 1))
    return Factors(slice(3, 99), operation, a, delta)


@pytest.mark.parametrize("made", [layer_of_96_weights, convolution_of_96_weights])
def test_rows_in_half_precision_are_off_by_its_rounding(monkeypatch, made):
    layer = made()
    half, rows = HalfRows.of(layer, Slabs()), layer.rows().flatten(1)
    assert half.values.dtype == torch.float16
    off = (half.rows() - rows).abs()
    assert (off <= 2**-11 * rows.abs() + 2**-40 * rows.norm(dim=1, keepdim=True) + 1e-22).all()
    assert half.rows()[[1, 3]].count_nonzero() == 0
    v, c, others = torch.randn(96).float(), torch.randn(50).float(), torch.randn(50).float()
    for block in (1, 96 * 7, 1 << 17):
        monkeypatch.setattr(layer_gradients, "BLOCK", block)
        torch.testing.assert_close(half.push(v), half.rows() @ v)
        torch.testing.assert_close(half.pull(c), c @ half.rows())
        slopes, total = half.normal(v, others)
        torch.testing.assert_close(slopes, half.push(v) + others)
        torch.testing.assert_close(total, half.pull(slopes))


def test_rows_in_half_precision_are_kept_where_they_are_less_and_float32_was_asked_for():
    layer = layer_of_96_weights()
    found = SampleGradients(50, 100, [layer])
    kept = found.compact(Slabs())
    assert isinstance(kept.layers[0], HalfRows)
    assert kept.nbytes == 50 * (2 * 96 + 4) < found.nbytes == 50 * 4 * 6 * (12 + 8)
    v, rows = torch.randn(100).float(), layer.rows().flatten(1)
    moved = kept.pull(kept.push(v)) - found.pull(found.push(v))
    bound = 2.1 * 2**-11 * (rows.abs() @ v[3:99].abs()) @ rows.abs()
    assert 0 < moved.norm() and (moved[3:99].abs() <= bound).all()
    double = replace(layer, a=layer.a.double(), delta=layer.delta.double())
    wide = replace(layer, a=layer.a[:, :1], delta=layer.delta[:, :1])  # 20 numbers
    for other in (double, wide):
        (held,) = SampleGradients(50, 100, [other]).compact(Slabs()).layers
        assert isinstance(held, Factors)


@pytest.mark.parametrize("geometry", [((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 2), (1, 2))])
@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_a_convolution_of_images_with_channels_last_gives_the_same_rows(
    monkeypatch, geometry, at_once
):
    monkeypatch.setattr(layer_gradients, "COLUMNS", at_once)
    layer = nn.Conv2d(3, 4, (3, 2), *geometry)
    images = torch.randn(N, 3, 9, 7)
    rows = []
    for x in (images, images.to(memory_format=torch.channels_last)):
        y = layer(x)
        delta = torch.linspace(-1, 1, y.numel()).view(y.shape)
        operation = Convolution(layer.weight.shape, (*geometry, False, [0, 0], 1))
        rows.append(operation.gradients(x, delta.to(x)))
    torch.testing.assert_close(rows[1], rows[0])

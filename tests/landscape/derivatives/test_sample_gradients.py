"""Per-sample gradients by layers against those of `torch.func`, which knows nothing of layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from known_layers import KNOWN, Applied, Checkpointed, N, image, losses
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lsa.landscape import flatten
from lsa.landscape.derivatives import layer_gradients, sample_gradients
from lsa.landscape.derivatives.layer_gradients import Convolution

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
    for held in (found, found.faster(math.inf)):
        torch.testing.assert_close(held.rows(), rows)
        torch.testing.assert_close(held.push(v), rows @ v)
        torch.testing.assert_close(held.pull(c), c @ rows)
        torch.testing.assert_close(held.normal(v), (rows @ v) @ rows)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", KNOWN)
def test_forms_of_fast_products_keep_to_their_room(name, share):
    model, shape = KNOWN[name]()
    found = sample_gradients.of(losses(model, torch.randn(shape)), flatten(model))
    assert found is not None
    most = found.faster(math.inf).nbytes
    room = found.nbytes + share * max(0, most - found.nbytes)
    held = found.faster(room)
    assert held.nbytes <= room
    torch.testing.assert_close(held.rows(), found.rows())


def test_layers_are_rows_where_many_positions_share_their_weights():
    """A layer that is applied to a sample once is multiplied faster than its rows are read."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 9))
    found = sample_gradients.of(losses(model, torch.randn(N, 3, 8, 8)), flatten(model))
    assert found is not None
    held = found.faster(math.inf)
    in_rows = {(layer.span.start, layer.span.stop) for layer in held.layers if len(layer.held) == 1}
    assert in_rows == {(0, 112), (112 + 256 * 9, 112 + 256 * 9 + 9)}


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
    assert sample_gradients.of(losses(model, square), theta) is None
    assert sample_gradients.of(losses(model, square), theta, check=False) is not None
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
    assert found.nbytes == 8 * N * (50 + 2 * 60)  # the inputs once, δ of each


def test_a_layer_keeps_whatever_is_smaller():
    wide, narrow = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(120, 3, bias=False)
    model = nn.Sequential(wide, nn.Flatten(), narrow)
    found = sample_gradients.of(losses(model, torch.randn(image())), flatten(model))
    assert found is not None
    convolution, linear = sorted(found.layers, key=lambda layer: layer.span.start)
    assert convolution.held[0].shape == (N, 4 * 3 * 9)  # for 6·5·(3 + 4) numbers
    assert [t.shape for t in linear.held] == [(N, 120), (N, 3)]  # for 360


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

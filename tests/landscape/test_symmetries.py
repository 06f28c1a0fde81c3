"""Rescalings that leave the function as it is: found where they are, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.symmetries import function_change, rescaled, rescalings
from lsa.maths.alignment.permutations import permutation_spec
from lsa.training import models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Shape = tuple[int, ...]


def landscape(name: str, shape: Shape, **options: object) -> Landscape:
    """A network in float64 whose normalisation statistics are not the initial ones."""
    rng = torch.Generator().manual_seed(0)
    model = models.build(name, input_shape=shape, classes=3, seed=0, **options)
    x = torch.randn(12, *shape, generator=rng)
    found = Landscape(model, x, torch.arange(12) % 3)
    return found.recalibrated(flatten(model)).double()


def search(place: Landscape) -> tuple[Tensor, dict]:
    theta = flatten(place.model)
    return theta, rescalings(place, theta, permutation_spec(place.model))


@pytest.mark.parametrize(
    ("name", "shape", "options", "groups"),
    [
        ("mlp", (5,), {"hidden": [6, 4]}, 2),
        ("simple_cnn", (1, 8, 8), {"width": 4}, 4),
        ("mlp", (5,), {"hidden": [6, 4], "activation": "tanh"}, 0),
        ("mlp", (5,), {"hidden": [6, 4], "activation": "gelu"}, 0),
        ("mlp", (5,), {"hidden": []}, 0),
    ],
)
def test_layers_before_a_homogeneous_activation_are_found(name, shape, options, groups):
    place = landscape(name, shape, **options)
    theta, changes = search(place)
    assert len(changes) == groups
    rng = torch.Generator().manual_seed(1)
    sizes = permutation_spec(place.model).sizes
    factors = {g: torch.rand(sizes[g], generator=rng).double() + 0.5 for g in changes}
    other = rescaled(place, theta, changes, factors)
    assert function_change(place, theta, place, other) < 1e-12
    assert torch.equal(other, theta) is (groups == 0)


def test_behind_batch_norm_scale_and_shift_are_scaled():
    place = landscape("resnet20", (3, 8, 8), norm="batch")
    theta, changes = search(place)
    sizes = permutation_spec(place.model).sizes
    assert len(changes) == len(sizes) > 5
    moved = {name for change in changes.values() for name in change}
    assert any("bn" in name or "norm" in name for name in moved)
    factors = {g: torch.full((sizes[g],), 3.0).double() for g in changes}
    other = rescaled(place, theta, changes, factors)
    assert function_change(place, theta, place, other) < 1e-12
    assert not torch.allclose(other, theta)


def test_scaled_weights_are_those_of_the_definition():
    place = landscape("mlp", (5,), hidden=[6])
    theta, changes = search(place)
    (group,) = changes
    factors = torch.arange(1.0, 7.0).double()
    before = place.unflatten(theta)
    after = place.unflatten(rescaled(place, theta, changes, {group: factors}))
    first, last = (n.removesuffix(".weight") for n in before if n.endswith("weight"))
    torch.testing.assert_close(
        after[f"{first}.weight"], before[f"{first}.weight"] * factors[:, None]
    )
    torch.testing.assert_close(after[f"{first}.bias"], before[f"{first}.bias"] * factors)
    torch.testing.assert_close(after[f"{last}.weight"], before[f"{last}.weight"] / factors)
    assert torch.equal(after[f"{last}.bias"], before[f"{last}.bias"])


def test_a_frozen_layer_takes_its_neighbours_symmetry():
    place = landscape("mlp", (5,), hidden=[6, 4])
    last = [m for m in place.model.modules() if isinstance(m, nn.Linear)][-1]
    last.requires_grad_(False)
    place = place.with_model(place.model)
    _, changes = search(place)
    assert len(changes) == 1  # the second hidden layer has nothing that could take the scale back

"""What a recipe describes: its network, its loss or objective, and its landscape."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lsa.landscape import Landscape
from lsa.landscape.terms import Objective
from lsa.project import Recipe
from lsa.training import losses, models
from lsa.training.data import Data, Streams


def network(recipe: Recipe, split: Data | Streams, trusted: Collection[str] = ()) -> nn.Module:
    """The recipe's network with its initial weights, on the CPU.

    Args:
        recipe: Names the network and the seed.
        split: Its data, whose shape and classes the network takes.
        trusted: Packages whose factories may be imported.
    """
    named, seed = recipe.model, recipe.seed
    if isinstance(split, Streams):
        return models.build(
            named.name, input_shape=None, classes=0, seed=seed, trusted=trusted, **named.options
        )
    x = split.x_train
    return models.build(
        named.name,
        input_shape=tuple(x.shape[1:]),
        classes=split.classes,
        seed=seed,
        dtype=torch.float32 if x.is_floating_point() else x.dtype,
        logits=split.classes > 0 and recipe.loss.name == losses.DEFAULT,
        trusted=trusted,
        **named.options,
    )


def loss_of(recipe: Recipe, trusted: Collection[str] = ()) -> losses.Loss:
    """The recipe's loss."""
    return losses.build(recipe.loss.name, trusted=trusted, **recipe.loss.options)


def objective_of(recipe: Recipe, trusted: Collection[str] = ()) -> Objective:
    """The recipe's objective, where it has one."""
    assert recipe.objective is not None
    return losses.objective(recipe.objective.name, trusted=trusted, **recipe.objective.options)


def landscape_of(
    recipe: Recipe, split: Data | Streams, model: nn.Module, trusted: Collection[str] = ()
) -> Landscape:
    """L(θ) of a recipe on all samples of the training split, on the network's device.

    Args:
        recipe: Names the loss or the objective.
        split: Its data.
        model: The network.
        trusted: Packages whose factories may be imported.
    """
    if isinstance(split, Streams):
        objective, device = objective_of(recipe, trusted), next(model.parameters()).device
        return Landscape(model, split.train, objective=objective, device=device)
    return Landscape(model, split.x_train, split.y_train, loss_of(recipe, trusted))


def held_out(landscape: Landscape, split: Data | Streams) -> Landscape:
    """The same network and loss on all samples of the held-out split."""
    if isinstance(split, Streams):
        return landscape.with_data(split.val)
    return landscape.with_data(split.x_val, split.y_val)

"""What a recipe describes: its network, its loss or objective, and its landscape."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape
from lsa.landscape.terms import Objective
from lsa.project import Recipe, factories
from lsa.runtime.errors import InputError
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
        # A network that other code trained may get another precision with its weights.
        dtype=torch.float32 if recipe.origin and x.is_floating_point() else x.dtype,
        logits=split.classes > 0 and recipe.loss.name == losses.DEFAULT,
        trusted=trusted,
        **named.options,
    )


def check_fit(recipe: Recipe, split: Data, model: nn.Module, trusted: Collection[str]) -> None:
    """Try the loss on a few samples, and whether there are images to augment.

    Args:
        recipe: Names them.
        split: The data.
        model: The network before its training, on the CPU; a copy of it is tried.
        trusted: Packages whose factories may be imported.

    Raises:
        InputError: They do not fit each other.
    """
    augment, shape = recipe.train.augment, tuple(split.x_train.shape[1:])
    if (augment.crop or augment.flip) and len(shape) != 3:
        raise InputError(
            f"augment takes images of shape (channels, height, width), and an input of "
            f"{recipe.dataset.name} has the shape {shape}; leave augment out"
        )
    label, loss = f"loss {recipe.loss.name}", loss_of(recipe, trusted)
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), _own_random_states(), warnings.catch_warnings():
        # torch's warning of a loss that broadcasts
        warnings.filterwarnings("error", "Using a target size")
        for n in (2, 3):  # what broadcasts by chance at one size does not at the other
            x, y = split.x_train[:n].cpu(), split.y_train[:n].cpu()
            outputs = model(x)
            try:
                value = loss(outputs, y)
            except (RuntimeError, ValueError, TypeError, IndexError, UserWarning) as error:
                shapes = tuple(getattr(outputs, "shape", ())), tuple(y.shape)
                raise InputError(
                    f"{label} does not take outputs {shapes[0]} with targets {shapes[1]}: "
                    f"{factories.one_line(error)}; choose a loss that fits the data"
                ) from error
            if not isinstance(value, Tensor) or value.ndim:
                kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise InputError(
                    f"{label} returns {kind}; it must return a scalar, the mean over the batch"
                )


@contextlib.contextmanager
def _own_random_states() -> Iterator[None]:
    """A block after which the generators of torch, NumPy and Python are as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


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

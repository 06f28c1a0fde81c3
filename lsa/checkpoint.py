"""A checkpoint: weights, buffers, optimizer state and the recipe that rebuilds its landscape.

On disk it is a folder of `config.json`, `weights.safetensors` and `optimizer.safetensors`. Nothing
in it can run code: no pickle, and a model factory outside lsa, torch and torchvision is imported
only when the local user trusts its package.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lsa import data, serial, stability
from lsa.data import Data
from lsa.errors import InputError
from lsa.landscape import Landscape, flatten
from lsa.project import Recipe
from lsa.sharded import shared
from lsa.stability import OptimizerState
from lsa.train import network

FORMAT = 1
CONFIG, WEIGHTS, OPTIMIZER = "config.json", "weights.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One point of a training run, with everything that a probe needs there."""

    recipe: Recipe
    epoch: int
    weights: Mapping[str, Tensor]  # the model's state_dict: parameters and buffers
    optimizer_state: Mapping[str, Any]
    data_hash: str
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    trusted: Collection[str] = ()
    model_id: str = ""  # of the MLflow logged model, when it came from a store
    run_id: str = ""  # of the training run

    @functools.cached_property
    def data(self) -> Data:
        """The dataset of the training run, on `device`.

        Raises:
            InputError: The data here are not those that the checkpoint was trained on.
        """
        split = _load_data(self.recipe.dataset.model_dump_json(), self.device)
        if split.hash != self.data_hash:
            raise InputError(
                f"dataset {self.recipe.dataset.name} here has hash {split.hash[:12]}, the "
                f"checkpoint was trained on {self.data_hash[:12]}; get the same files and versions"
            )
        return split

    @functools.cached_property
    def model(self) -> nn.Module:
        """The network with the checkpoint's weights and buffers."""
        model = network(self.recipe, self.data, self.trusted)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(
                f"the checkpoint's weights do not fit its model {self.recipe.model.name}: "
                f"{reason}; it was altered or made by another version"
            ) from None
        return model.to(self.device).eval()

    @functools.cached_property
    def landscape(self) -> Landscape:
        """L(θ) on the project's fixed subset of the training split."""
        whole, samples = self.training, self.recipe.landscape.samples
        if samples == "all" or samples >= whole.n_samples:
            return whole
        # Seed 0: one subset for all optimizers and seeds, so that they differ by θ alone.
        order = torch.randperm(whole.n_samples, generator=torch.Generator().manual_seed(0))
        return whole.subset(order[:samples].to(self.device))

    @functools.cached_property
    def training(self) -> Landscape:
        """L(θ) on the whole training split."""
        return shared(Landscape(self.model, self.data.x_train, self.data.y_train))

    @functools.cached_property
    def validation(self) -> Landscape:
        """L(θ) on the whole held-out split."""
        return self.landscape.with_data(self.data.x_val, self.data.y_val)

    @functools.cached_property
    def theta(self) -> Tensor:
        """θ of the checkpoint, shape `(d,)`."""
        return flatten(self.model)

    @functools.cached_property
    def theta_init(self) -> Tensor:
        """θ from which the training run started, shape `(d,)`."""
        return flatten(network(self.recipe, self.data, self.trusted).to(self.device))

    @functools.cached_property
    def optimizer(self) -> OptimizerState:
        """The optimizer as of the checkpoint.

        Raises:
            InputError: Its preconditioner is not known, or its state is not kept.
        """
        return stability.read(
            self.recipe.rule.name,
            self.optimizer_state,
            list(self.model.parameters()),
            self.recipe.train.batch_size,
        )


@functools.lru_cache(maxsize=2)
def _load_data(dataset: str, device: str) -> Data:
    """Data shared by the checkpoints of one process."""
    options = json.loads(dataset)
    return data.load(options.pop("name"), device=device, **options)


def load_data(recipe: Recipe, device: str) -> Data:
    """The recipe's dataset on a device, loaded once per process."""
    return _load_data(recipe.dataset.model_dump_json(), device)


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's files into an existing folder."""
    config = {
        "format": FORMAT,
        "recipe": checkpoint.recipe.model_dump(),
        "epoch": checkpoint.epoch,
        "data_hash": checkpoint.data_hash,
        "versions": dict(checkpoint.versions),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.weights.items()}
    save_file(weights, folder / WEIGHTS)
    serial.save(checkpoint.optimizer_state, folder / OPTIMIZER)


def read(folder: Path, **fields: Any) -> Checkpoint:
    """Read what `save` wrote; `fields` are set on the checkpoint.

    Raises:
        InputError: A file is missing, damaged or of another format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config["format"] != FORMAT:
            raise InputError(
                f"checkpoint format {config['format']} is not {FORMAT}; use a matching lsa version"
            )
        return Checkpoint(
            recipe=Recipe.model_validate(config["recipe"]),
            epoch=config["epoch"],
            weights=load_file(folder / WEIGHTS),
            optimizer_state=serial.load(folder / OPTIMIZER),
            data_hash=config["data_hash"],
            versions=config["versions"],
            **fields,
        )
    except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"{folder.name} is no whole lsa checkpoint ({error}); register it again"
        ) from None

"""A checkpoint: weights, buffers, optimizer state and the recipe that rebuilds its landscape.

On disk it is a folder of `config.json`, `weights.safetensors` and `optimizer.safetensors`. Nothing
in it can run code: no pickle, and a model factory outside lsa, torch and torchvision is imported
only when the local user trusts its package. `config.json` holds the SHA-256 of all that is in the
folder, so that damage is told and not measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.sharded import shared
from lsa.project import ELSEWHERE, Recipe, factories, first_rule
from lsa.runtime import documents, modes
from lsa.runtime.errors import InputError
from lsa.tracking import serial
from lsa.training import data, optimizers, stability
from lsa.training.data import Data, Streams
from lsa.training.recipes import held_out, landscape_of, network
from lsa.training.stability import OptimizerState

T = TypeVar("T")
FORMAT = 1
CONFIG, WEIGHTS, OPTIMIZER = "config.json", "weights.safetensors", "optimizer.safetensors"


def _computed(function: Callable[[Any], T]) -> functools.cached_property[T]:
    """A property that is computed once, in torch's usual modes."""
    return functools.cached_property(modes.usual()(function))


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
    trusted: Collection[str] = ()  # packages, and datasets by their `factories.permission`
    model_id: str = ""  # of the MLflow logged model, when it came from a store
    run_id: str = ""  # of the training run

    def __repr__(self) -> str:
        about = ", ".join(f"{name} {text}" for name, text in self._facts().items() if text)
        return f"<Checkpoint: {about}>"

    def _repr_html_(self) -> str:
        from lsa.figures import notebook  # here, since few who load a checkpoint show it

        return notebook.facts("checkpoint", self._facts())

    def _facts(self) -> dict[str, str]:
        """Description of the checkpoint without its weights."""
        recipe = self.recipe
        return {
            "project": recipe.project,
            "model": recipe.model.name,
            "dataset": recipe.dataset.name,
            "optimizer": f"{recipe.optimizer} ({recipe.rule.name})",
            "seed": str(recipe.seed),
            "epoch": str(self.epoch),
            "device": self.device,
            "run": self.run_id,
            "model id": self.model_id,
        }

    @property
    def is_last(self) -> bool:
        """Whether this is the training's last checkpoint."""
        ended = bool(self.recipe.origin) or self.epoch == self.recipe.train.epochs
        return ended and bool(self.run_id)

    @_computed
    def data(self) -> Data | Streams:
        """The dataset of the training run, on `device`.

        Raises:
            InputError: The data here are not those that the checkpoint was trained on.
        """
        split = load_data(self.recipe, self.device, self.trusted)
        if split.hash != self.data_hash:
            raise InputError(
                f"dataset {self.recipe.dataset.name} here has hash {split.hash[:12]}, the "
                f"checkpoint was trained on {self.data_hash[:12]}; get the same files and versions"
            )
        return split

    @_computed
    def model(self) -> nn.Module:
        """The network with the checkpoint's weights and buffers, on its device.

        Raises:
            InputError: A tensor is missing, or has another shape or type than the network's.
        """
        model = network(self.recipe, self.data, self.trusted)
        for key, own in model.state_dict(keep_vars=True).items():
            given = self.weights.get(key, own)
            # `load_state_dict` would drop the imaginary part, or the fraction, in silence.
            if isinstance(own, Tensor) and not torch.can_cast(given.dtype, own.dtype):
                raise InputError(
                    f"the checkpoint's {key} is {given.dtype} and its model's is {own.dtype}; it "
                    "was altered or made by another version"
                )
            if self.recipe.origin:  # of the precision in which they were kept
                own.data = own.data.to(given.dtype)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(
                f"the checkpoint's weights do not fit its model {self.recipe.model.name}: "
                f"{reason}; it was altered or made by another version"
            ) from None
        return model.to(self.device).eval()

    @_computed
    def landscape(self) -> Landscape:
        """L(θ) on the project's fixed subset of the training split."""
        return self._subset(self.training)

    def _subset(self, full: Landscape) -> Landscape:
        samples = self.recipe.landscape.samples
        if samples == "all" or samples >= full.n_samples:
            return full
        # Seed 0: one subset for all optimizers and seeds, so that they differ by θ alone.
        order = torch.randperm(full.n_samples, generator=torch.Generator().manual_seed(0))
        return full.subset(order[:samples].to(self.device))

    @_computed
    def training(self) -> Landscape:
        """L(θ) on the whole training split."""
        return shared(landscape_of(self.recipe, self.data, self.model, self.trusted))

    @_computed
    def validation(self) -> Landscape:
        """L(θ) on the whole held-out split."""
        return held_out(self.landscape, self.data)

    @_computed
    def theta(self) -> Tensor:
        """θ of the checkpoint, shape `(d,)`."""
        return flatten(self.model)

    @_computed
    def theta_init(self) -> Tensor:
        """θ from which the training run started, shape `(d,)`.

        Raises:
            InputError: The checkpoint was trained elsewhere, so nothing is known of its start.
        """
        if self.recipe.origin:
            raise InputError(
                "the checkpoint was trained elsewhere and its initial weights are not known; "
                "choose one of lsa train"
            )
        return flatten(network(self.recipe, self.data, self.trusted).to(self.device))

    @property
    def has_optimizer(self) -> bool:
        """Whether the checkpoint has an optimizer: registered with one, or trained by lsa."""
        return bool(self.optimizer_state) or self.recipe.rule.name != ELSEWHERE

    @_computed
    def optimizer(self) -> OptimizerState:
        """The optimizer as of the checkpoint.

        Raises:
            InputError: Its class is unknown or not trusted, or its state is not kept.
        """
        rule, model, origin = self.recipe.rule, self.model, self.recipe.origin
        if not self.has_optimizer:
            raise InputError(
                "the checkpoint was registered without its optimizer; register it with "
                "lsa.register(…, optimizer=optimizer)"
            )
        try:
            optimizer = optimizers.restored(
                rule.name, self.optimizer_state, model, trusted=self.trusted, **rule.options
            )
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the checkpoint's state of {rule.name} is none that torch wrote ({error!r}); "
                "train again"
            ) from None
        parameters = [p for p in model.parameters() if p.requires_grad]
        size = origin.batch_size if origin else self.recipe.train.batch_size
        return stability.read(optimizer, parameters, size)


@functools.lru_cache(maxsize=2)
def _load_data(
    dataset: str, device: str, trusted: tuple[str, ...], batches: bool
) -> Data | Streams:
    """Data shared by the checkpoints of one process."""
    options = json.loads(dataset)
    name = options.pop("name")
    if batches:
        return data.streams(name, trusted=trusted, **options)
    ours = factories.permission(name, options) in trusted
    return data.load(name, device=device, trusted=trusted, ours=ours, **options)


def load_data(recipe: Recipe, device: str, trusted: Collection[str] = ()) -> Data | Streams:
    """The recipe's dataset on a device, or its batches where it has an objective.

    It is loaded once per process.

    Args:
        recipe: Names the dataset.
        device: Where its tensors go.
        trusted: Packages whose factories may be imported.
    """
    dataset, batches = recipe.dataset.model_dump_json(), recipe.objective is not None
    return _load_data(dataset, device, tuple(trusted), batches)


class _Config(pydantic.BaseModel):
    """Content of `config.json`."""

    format: int
    recipe: dict[str, Any]
    epoch: Annotated[int, pydantic.Field(ge=0)]
    data_hash: str
    versions: dict[str, str]
    sha256: str = ""  # a checkpoint made before there was one has none


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's files into an existing folder."""
    config = {
        "format": FORMAT,
        "recipe": checkpoint.recipe.model_dump(),
        "epoch": checkpoint.epoch,
        "data_hash": checkpoint.data_hash,
        "versions": dict(checkpoint.versions),
    }
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.weights.items()}
    config["sha256"] = _digest(config, weights, checkpoint.optimizer_state)
    save_file(weights, folder / WEIGHTS)
    serial.save(checkpoint.optimizer_state, folder / OPTIMIZER)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _digest(config: Mapping[str, Any], weights: Mapping[str, Tensor], state: Any) -> str:
    described = json.loads(json.dumps({k: v for k, v in config.items() if k != "sha256"}))
    return serial.digest({"config": described, "weights": dict(weights), "optimizer": state})


def read(folder: Path, **fields: Any) -> Checkpoint:
    """Read what `save` wrote; `fields` are set on the checkpoint.

    Raises:
        InputError: A file is missing, damaged, altered or of another format.
    """
    try:
        stored = documents.read_json(folder / CONFIG)
        config = _Config.model_validate(stored)
        if config.format != FORMAT:
            raise InputError(f"format {config.format} is not {FORMAT}; use a matching lsa version")
        weights, _ = serial.tensors(folder / WEIGHTS)
        state = serial.load(folder / OPTIMIZER)
        if config.sha256 and config.sha256 != _digest(stored, weights, state):
            raise InputError("its content is not what was written")
        recipe = Recipe.model_validate(config.recipe)
    except pydantic.ValidationError as error:
        raise _damaged(folder, f"{CONFIG}: {first_rule(error)}") from None
    except InputError as error:
        raise _damaged(folder, error) from None
    return Checkpoint(
        recipe=recipe,
        epoch=config.epoch,
        weights=weights,
        optimizer_state=state,
        data_hash=config.data_hash,
        versions=config.versions,
        **fields,
    )


def recorded(folder: Path) -> str:
    """The SHA-256 of its content that a checkpoint's folder states."""
    stored = documents.read_json(folder / CONFIG)
    return str(stored.get("sha256", "")) if isinstance(stored, dict) else ""


def _damaged(folder: Path, reason: object) -> InputError:
    return InputError(f"{folder.name} is no whole lsa checkpoint ({reason}); register it again")

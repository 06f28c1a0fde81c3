"""A registered checkpoint, ready for a probe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch

from lsa import project
from lsa.runtime import arguments, modes, ranks
from lsa.runtime.errors import InputError
from lsa.tracking import registered, registry, settings
from lsa.tracking.checkpoint import Checkpoint


def device_of(name: str | torch.device) -> str:
    """`auto` is the GPU when there is one.

    Raises:
        InputError: No such device here.
    """
    name = str(name) if isinstance(name, torch.device) else arguments.text("device", name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = ranks.device(name)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"there is no device {name!r} here; use auto, cpu or cuda") from None
    return name


@settings.restored()
@modes.usual()
def load(
    reference: str | os.PathLike[str] | None = None,
    *,
    project: str | os.PathLike[str] | None = None,
    optimizer: str | None = None,
    seed: int | None = None,
    samples: int | None = None,
    device: str | torch.device = "auto",
    trust: str | Sequence[str] = (),
) -> Checkpoint:
    """A registered checkpoint, ready for a probe: `.landscape`, `.theta`, `.validation`.

    Args:
        reference: ID of the training run, `models:/name/version`, `models:/name@alias`, ….
        project: Instead of a reference: the project (default `digits`), …
        optimizer: … the optimizer as the project names it, …
        seed: … and the seed (default: the project's first). The newest version counts.
        samples: Size of the landscape's subset, in place of the project's.
        device: `auto`, `cpu`, `cuda`, ….
        trust: Packages outside lsa and torch whose model factories may be imported, and datasets
            that may be fetched (`CIFAR10`).

    Raises:
        InputError: Nothing registered there, or not an lsa checkpoint.
    """
    named = (("reference", reference), ("project", project), ("optimizer", optimizer))
    reference, project, optimizer = (arguments.optional_text(*given) for given in named)
    seed = None if seed is None else arguments.whole_number("seed", seed)
    trust, device_name = arguments.names("trust", trust), device_of(device)
    address, trusted = registered.locate(reference, project, optimizer, seed)
    address = ranks.agreed(address)
    source = registry.fetch(address, device=device_name, trusted=(*trusted, *trust))
    return on_subset(source, samples)


def on_subset(source: Checkpoint, samples: int | str | None) -> Checkpoint:
    """The checkpoint with its landscape on another number of samples."""
    if samples is None:
        return source
    if samples != "all":
        samples = arguments.whole_number("samples", samples, least=1)
    split = project.Split(samples=samples)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(source, recipe=source.recipe.model_copy(update={"landscape": split}))

"""A registered checkpoint, ready for a probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lsa import project
from lsa.runtime import ranks
from lsa.runtime.errors import InputError
from lsa.tracking import registered, registry
from lsa.tracking.checkpoint import Checkpoint


def device_of(name: str) -> str:
    """`auto` is the GPU when there is one.

    Raises:
        InputError: No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = ranks.device(name)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"there is no device {name!r} here; use auto, cpu or cuda") from None
    return name


def load(
    reference: str | None = None,
    *,
    project: str | None = None,
    optimizer: str | None = None,
    seed: int | None = None,
    samples: int | None = None,
    device: str = "auto",
    trust: Sequence[str] = (),
) -> Checkpoint:
    """A registered checkpoint, ready for a probe: `.landscape`, `.theta`, `.validation`.

    Args:
        reference: ID of the training run, `models:/name/version`, `models:/name@alias`, ….
        project: Instead of a reference: the project (default `digits`), …
        optimizer: … the optimizer as the project names it, …
        seed: … and the seed (default: the project's first). The newest version counts.
        samples: Size of the landscape's subset, in place of the project's.
        device: `auto`, `cpu`, `cuda`, ….
        trust: Packages outside lsa and torch whose model factories may be imported.

    Raises:
        InputError: Nothing registered there, or not an lsa checkpoint.
    """
    address, trusted = registered.locate(reference, project, optimizer, seed)
    address = ranks.agreed(address)
    found = registry.fetch(address, device=device_of(device), trusted=(*trusted, *trust))
    return on_subset(found, samples)


def on_subset(found: Checkpoint, samples: int | str | None) -> Checkpoint:
    """The checkpoint with its landscape on another number of samples."""
    if samples is None:
        return found
    split = project.Split.model_validate({"samples": samples})
    return dataclasses.replace(found, recipe=found.recipe.model_copy(update={"landscape": split}))

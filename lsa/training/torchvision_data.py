"""Classification datasets of torchvision, read whole from their files or else downloaded."""

from __future__ import annotations

import inspect
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor
from torchvision import datasets

from lsa.project import factories
from lsa.runtime import variables
from lsa.runtime.errors import InputError
from lsa.training.images import Split, decode, located


def names() -> list[str]:
    """The classes of `torchvision.datasets`, without those that others are made of.

    And without LSUN, which unpickles what lies in its folder: a checkpoint names both.
    """
    parts = ("VisionDataset", "ImageFolder", "DatasetFolder", "FakeData", "LSUN")
    return [name for name in datasets.__all__ if name not in parts]


def read(
    name: str,
    root: str | None = None,
    size: PositiveInt | None = None,
    trust: str = "",
    **options: Any,
) -> list[Split]:
    """A classification dataset of torchvision, downloaded on first use.

    Args:
        name: The class in `torchvision.datasets`.
        root: Where the files are or shall be; a relative one is looked up in `$LSA_DATA`, else in
            the current folder. Default: `$LSA_DATA`, else `~/.cache/lsa/datasets`.
        size: Resize the shorter side to so many pixels and crop the centre.
        trust: What the user must trust before anything is fetched or read outside of the data
            folder; empty where the user has named the dataset.
        **options: Of that class, for example `split: balanced` for EMNIST.

    Returns:
        The training and the test split (where there is none, `val`), or the only one.

    Raises:
        InputError: Unknown option, files that are not there and cannot or may not be downloaded,
            a folder that is not trusted, or a dataset that is not of images with one class each.
    """
    cls = getattr(datasets, name)
    known = inspect.signature(cls).parameters
    filled = {"root", "train", "download", "transform", "target_transform", "transforms", "loader"}
    if "train" in known or name == "EMNIST":  # whose `train` hides in **kwargs
        choices = [[{"train": True}], [{"train": False}]]
    elif "split" in known:
        filled.add("split")
        tried = [("train", "trainval"), ("test", "val")]
        choices = [[{"split": split} for split in splits] for splits in tried]
    else:
        choices = [[{}]]
    options = factories.check_options(f"dataset {name}", cls, options, filled)
    default = variables.folder(variables.DATA, "~/.cache/lsa/datasets")
    folder = located(root) if root else default
    if trust and not (folder.is_dir() and folder.resolve().is_relative_to(default.resolve())):
        raise InputError(
            f"dataset {name} is not in your data folder {default}, and a checkpoint alone may make "
            f"or read no other; allow {folder} with --trust {trust}, or set LSA_DATA."
        )
    splits = [_opened(cls, folder, options, choice, trust) for choice in choices]
    return [_as_split(name, split, size) for split in splits]


def _opened(
    cls: Any, root: Path, options: dict[str, Any], choices: list[dict[str, Any]], trust: str
) -> Any:
    """The dataset from its files, else downloaded; the first of `choices` that it knows."""
    parameters = inspect.signature(cls).parameters
    downloads = "download" in parameters or "kwargs" in parameters
    attempts = [{"download": False}, {"download": True}] if downloads else [{}]
    attempts = attempts[:1] if trust else attempts
    problem: Exception | None = None
    for attempt in attempts:
        for choice in choices:
            try:
                with redirect_stdout(sys.stderr):
                    return cls(root=str(root), **attempt, **choice, **options)
            except ValueError as error:  # it has no split of that name
                problem = problem or error
            except Exception as error:  # no files, no network, no archive: one line in any case
                problem = error
                break
    reason = factories.one_line(problem) if problem else ""
    if isinstance(problem, ValueError):
        raise InputError(f"dataset {cls.__name__} cannot be read: {reason}") from problem
    if trust and downloads:
        raise InputError(
            f"dataset {cls.__name__} is not in {root}, and a checkpoint alone may download "
            f"nothing; allow it with --trust {trust}, or put {_files(cls)} there yourself."
        ) from problem
    failed = "could not be downloaded" if downloads else "torchvision does not download it"
    raise InputError(
        f"dataset {cls.__name__} is not in {root} and {failed} ({reason}); put {_files(cls)} "
        "there yourself."
    ) from problem


def _files(cls: Any) -> str:
    """The files a torchvision dataset looks for, as far as its class says so."""
    own = vars(cls)
    if isinstance(resources := own.get("resources"), list):
        names = [f"{cls.__name__}/raw/{name}" for name, _ in resources]
        # torchvision takes an archive by its checksum only, and the unpacked file as it is.
        unpacked = " (unpacked, without .gz, where another mirror packed them)"
        return ", ".join(names) + unpacked * names[0].endswith(".gz")
    if splits := own.get("split_list"):
        return ", ".join(splits[split][1] for split in ("train", "test"))
    return own.get("filename") or f"the files that torchvision's page on {cls.__name__} names"


def _as_split(name: str, dataset: Any, size: int | None) -> Split:
    """All images and labels: the dataset's own array where it has one, else item by item."""
    arrays = _array(dataset)
    if arrays and size is None:
        return arrays

    def item(i: int) -> tuple[Image.Image, int]:
        image, label = dataset[i]
        if not isinstance(image, Image.Image) or not isinstance(label, int | np.integer):
            raise InputError(f"dataset {name} is not one of images with a class; choose another.")
        return image, int(label)

    return decode(len(dataset), item, lambda i: f"image {i} of {name}", size)


def _array(dataset: Any) -> Split | None:
    data = getattr(dataset, "data", None)
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if not isinstance(data, np.ndarray | Tensor) or labels is None or np.ndim(labels) != 1:
        return None
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        return None
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.as_tensor(labels).long())

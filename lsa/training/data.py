"""Datasets by name: `digits`, torchvision's, a folder of images, or your own.

A dataset is held whole on the device that computes. Images are `(n, channels, height, width)` in
float32, normalised; what a factory of yours returns is taken as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lsa.landscape.batches import Batches
from lsa.project import factories
from lsa.runtime import modes
from lsa.runtime.errors import InputError
from lsa.training.images import Split, image_folder
from lsa.training.splits import divided, limited, normalisation, relabelled


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset in two fixed splits, on one device; of images unless a factory made it."""

    x_train: Tensor  # (n, c, h, w) float32, normalised
    y_train: Tensor  # (n,) int64, 0 … classes − 1
    x_val: Tensor  # (m, c, h, w) float32, normalised by the statistics of the training split
    y_val: Tensor  # (m,) int64
    classes: int  # 0 where the targets are no class numbers
    hash: str  # SHA-256 of both splits as raw bytes, before normalisation


@dataclass(frozen=True, eq=False)
class Streams:
    """A dataset in two fixed splits of batches, as an objective takes them."""

    train: Iterable[Any]  # read again for every pass: a DataLoader, a list, …
    val: Iterable[Any]
    hash: str  # SHA-256 of all batches
    steps: int  # batches of the training split


@modes.usual()
def streams(name: str, *, trusted: Collection[str] = (), **options: Any) -> Streams:
    """The batches of a dataset of one's own.

    Args:
        name: `package.module:factory`, which returns both splits, `train, val`: each a DataLoader,
            a list or another iterable that gives the same batches whenever it is read.
        trusted: Top-level packages whose factories may be imported.
        **options: Of the factory.

    Raises:
        InputError: No factory of one's own, not trusted, or not two such splits.
    """
    label = f"dataset {name}"
    if ":" not in name:
        raise InputError(f"{label} has no batches; an objective needs package.module:factory")
    made = factories.make(label, name, Data, trusted, options)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise InputError(f"{label} must return train, val: two iterables of batches")
    digest, numbers = hashlib.sha256(), []
    for split in made:
        numbers.append(0)
        for batch in Batches(split, torch.device("cpu")):
            numbers[-1] += 1
            for leaf in tree_leaves(batch.content):
                part = _hash([leaf]) if isinstance(leaf, Tensor) else repr(leaf)
                digest.update(part.encode())
    return Streams(*made, digest.hexdigest(), numbers[0])


@modes.usual()
def load(
    name: str,
    *,
    device: torch.device | str = "cpu",
    train_limit: int | None = None,
    val_limit: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    trusted: Collection[str] = (),
    ours: bool = True,
    **options: Any,
) -> Data:
    """The dataset `name`, every channel with mean 0 and variance 1 over the training split.

    A dataset without a split of its own is divided 80/20, stratified by class and fixed.

    Args:
        name: `digits` (in scikit-learn, 8×8 grey), `image_folder`, a class of
            `torchvision.datasets` such as `CIFAR10`, downloaded on first use, or
            `package.module:factory`, which returns both splits, each as inputs and targets:
            `(x, y), (x_val, y_val)`, tensors or arrays. Only options of its own apply to it.
        device: Where the tensors go.
        train_limit: Take only so many training images, a fixed stratified subset.
        val_limit: The same for the validation images.
        mean: Subtract this instead, of pixels between 0 and 1; one number, or one per channel.
        std: Divide by this, the same way; with mean=std=0.5 pixels lie between −1 and 1. The scale
            of the inputs scales first-layer gradients, so it decides which rates are stable.
        trusted: Top-level packages whose factories may be imported.
        ours: Whether the local user names the dataset. One that a stranger's checkpoint names is
            only read, and only below the user's own data folder; nothing is fetched for it.
        **options: Of the dataset: `root`, `size`, and what the torchvision class takes.

    Raises:
        InputError: Unknown name or option, files that cannot be found, fetched or decoded,
            images of differing sizes, a limit beyond the size of the split, or a mean without std.
    """
    label = f"dataset {name}"
    if ":" in name:
        limits = {"train_limit": train_limit, "val_limit": val_limit, "mean": mean, "std": std}
        options |= {key: value for key, value in limits.items() if value is not None}
        return _own(label, factories.make(label, name, Data, trusted, options), device)
    if name in READERS:
        reader = READERS[name]
        parts = reader(**factories.check_options(label, reader, options))
    else:
        parts = _torchvision(name, label, options, ours)
    parts, classes = relabelled(label, parts)
    train, val = parts if len(parts) == 2 else divided(parts[0])
    train = limited(train, "train_limit", train_limit)
    val = limited(val, "val_limit", val_limit)
    shift, scale = normalisation(label, train.images, mean, std)

    def normalised(split: Split) -> Tensor:
        images = split.images.to(device).float().sub_(shift.to(device)).div_(scale.to(device))
        # The layout in which convolutions are fastest; 1.3 times in training on a CPU.
        return images.contiguous(memory_format=torch.channels_last)

    return Data(
        x_train=normalised(train),
        y_train=train.labels.to(device),
        x_val=normalised(val),
        y_val=val.labels.to(device),
        classes=classes,
        hash=_hash(train, val),
    )


def _own(label: str, made: Any, device: torch.device | str) -> Data:
    """The data that a factory returned, on a device.

    Raises:
        InputError: It is not two splits of as many inputs as targets.
    """
    try:
        (x, y), (x_val, y_val) = made
        tensors = [torch.as_tensor(part) for part in (x, y, x_val, y_val)]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{label} must return (x, y), (x_val, y_val) of tensors or arrays; give the training "
            "split twice where there is no other."
        ) from None
    sizes = [len(part) for part in tensors]
    if sizes[0] != sizes[1] or sizes[2] != sizes[3] or 0 in sizes:
        raise InputError(
            f"{label} returns {sizes[0]} inputs with {sizes[1]} targets, and {sizes[2]} with "
            f"{sizes[3]}; return as many of each, at least 1."
        )
    targets = tensors[1]
    numbered = targets.ndim == 1 and not targets.is_floating_point() and int(targets.min()) >= 0
    classes = int(torch.cat([targets, tensors[3]]).max()) + 1 if numbered else 0
    x, y, x_val, y_val = (part.to(device) for part in tensors)
    return Data(x, y, x_val, y_val, classes, _hash(tensors[:2], tensors[2:]))


def batches(n: int, batch_size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Indices of one epoch: 0 … n − 1 in random order, in batches `(batch_size,)`.

    The last batch may be smaller.

    Raises:
        InputError: A batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is not positive; choose at least 1.")
    return iter(torch.randperm(n, generator=rng, device=rng.device).split(batch_size))


def augment(x: Tensor, rng: torch.Generator, *, crop: int = 0, flip: bool = False) -> Tensor:
    """Random crops and mirror images of a batch, every image its own, on the device of `x`.

    Args:
        x: Images, shape `(n, c, h, w)`. A crop shows zeros beyond the border; in a normalised
            image zero is the mean colour of the training split.
        rng: On the device of `x`.
        crop: Shift by up to so many pixels in each direction, the same as a random crop after
            zero padding by `crop` (He et al. 2016, §4.2, with 4).
        flip: Mirror left and right with probability ½.

    Returns:
        Images, shape `(n, c, h, w)`; `x` itself where nothing is asked for.

    Raises:
        InputError: A negative crop.
    """
    if crop < 0:
        raise InputError(f"crop={crop} is negative; choose 0 or more pixels.")
    if not crop and not flip:
        return x
    n, c, h, w = x.shape
    shift = torch.randint(-crop, crop + 1, (2, n, 1), generator=rng, device=x.device)
    rows = torch.arange(h, device=x.device) + shift[0]  # (n, h), where each row comes from
    columns = torch.arange(w, device=x.device) + shift[1]  # (n, w)
    if flip:
        mirrored = torch.rand(n, 1, generator=rng, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    outside = ~(_within(rows, h)[:, :, None] & _within(columns, w)[:, None, :])
    pixels = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    index = pixels.view(n, 1, h * w).expand(n, c, h * w)
    return x.flatten(2).gather(2, index).view(n, c, h, w).masked_fill_(outside[:, None], 0)


def _within(index: Tensor, length: int) -> Tensor:
    return (index >= 0) & (index < length)


def digits() -> list[Split]:
    """1,797 handwritten digits, 8×8 in 17 grey levels (Alpaydin & Kaynak 1998)."""
    # The file that scikit-learn's `load_digits` reads: importing scikit-learn takes a second.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None  # a dependency
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return [Split(table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].long())]


def _torchvision(name: str, label: str, options: dict[str, Any], ours: bool) -> list[Split]:
    from lsa.training import torchvision_data  # slow to import

    known = torchvision_data.names()
    if name not in known:
        hint = factories.nearest(name, [*READERS, *known])
        raise InputError(
            f"unknown dataset {name!r}.{hint} Known are {', '.join(READERS)}, the classes of "
            "torchvision.datasets, and package.module:factory."
        )
    read = torchvision_data.read
    checked = factories.check_options(label, read, options, ["name", "trust"])
    return read(name, trust="" if ours else factories.permission(name, options), **checked)


def _hash(*splits: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for tensor in split:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


READERS: dict[str, Callable[..., list[Split]]] = {"digits": digits, "image_folder": image_folder}

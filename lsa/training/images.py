"""Image files into one tensor: decoding in threads, resizing, class folders, and their cache."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lsa.project.factories import one_line
from lsa.runtime import variables
from lsa.runtime.cache import cache_folder, keep
from lsa.runtime.errors import InputError

T = TypeVar("T")

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TASK = 64  # images per task of a thread: one by one, small images spend their time in the queue


class Split(NamedTuple):
    """One split as read, before normalisation."""

    images: Tensor  # (n, c, h, w) uint8
    labels: Tensor  # (n,) int64


class File(NamedTuple):
    """An image file, its class, and what tells whether it has changed."""

    path: str
    name: str  # the path below the root
    label: str
    size: int
    modified: int  # ns


def located(root: str) -> Path:
    """`root` as a path; a relative one is looked up in `$LSA_DATA`, else in the current folder.

    Raises:
        InputError: No path of this machine's can be like that.
    """
    try:
        folder = variables.folder(variables.DATA, ".") / Path(root).expanduser()
        folder.is_dir()
        return folder
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"root={root!r} is no folder ({reason}); set it to one.") from None


def image_folder(root: str, size: PositiveInt | None = None) -> list[Split]:
    """Images in folders named after their class, below `train/` and `val/` (else `test/`).

    Without these the class folders stand in `root` itself and make one split. Images are decoded
    once, into a cache below `$LSA_CACHE` (else `~/.cache/lsa`) that is keyed by the names, sizes
    and modification times of the files. They are grey if all are, else RGB.

    Args:
        root: The folder; a relative one is looked up in `$LSA_DATA`, else in the current folder.
        size: Resize the shorter side to so many pixels and crop the centre; needed where sizes
            differ.

    Returns:
        The training and the validation split, or only one.

    Raises:
        InputError: No such folder or no images in it, a class that is only in the validation
            split, a file that cannot be decoded, or differing sizes.
    """
    folder = located(root)
    parts = [list(_files(part, folder)) for part in _parts(folder)]
    number = {label: i for i, label in enumerate(sorted({file.label for file in parts[0]}))}
    for file in parts[-1]:
        if file.label not in number:
            raise InputError(
                f"{file.path} is of the class {file.label!r}, which has no training images; "
                "add some or remove its folder."
            )
    files = [file for part in parts for file in part]
    images = _cached(_key(files, size), lambda: _decoded(files, size))
    labels = torch.tensor([number[file.label] for file in files])
    counts = [len(part) for part in parts]
    splits = zip(images.split(counts), labels.split(counts), strict=True)
    return [Split(x, y) for x, y in splits]


def _parts(folder: Path) -> list[Path]:
    """The folders that hold class folders."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder.absolute()}; set root: to a folder of images, absolute "
            "or relative to $LSA_DATA (else to the current folder)."
        )
    if not (folder / "train").is_dir():
        return [folder]
    for name in ("val", "test"):
        if (folder / name).is_dir():
            return [folder / "train", folder / name]
    raise InputError(
        f"{folder} has train/ but neither val/ nor test/; add one, or set root: to the train "
        "folder, which divides it 80/20."
    )


def _files(part: Path, root: Path) -> Iterator[File]:
    """All image files below the class folders of `part`, in the order of their names."""
    entries = [e.name for e in os.scandir(part) if e.is_dir() and not e.name.startswith(".")]
    number = 0
    for label in sorted(entries):
        for folder, subfolders, names in os.walk(part / label):
            subfolders.sort()
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES):
                    path = f"{folder}/{name}"
                    status = os.stat(path)
                    number += 1
                    below = path[len(str(root)) :]
                    yield File(path, below, label, status.st_size, status.st_mtime_ns)
    if not number:
        raise InputError(
            f"{part} has no images in class folders; expected files such as "
            f"{part}/cat/1.png ({', '.join(SUFFIXES)})."
        )


def _key(files: Iterable[File], size: int | None) -> str:
    digest = hashlib.sha256(f"1 {size}\n".encode())  # 1: the version of what is stored
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0{file.size}\0{file.modified}\n"))
    return digest.hexdigest()


def _cached(key: str, make: Callable[[], Tensor]) -> Tensor:
    path = cache_folder() / "images" / f"{key}.safetensors"
    try:
        return load_file(path)["images"]
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("%s is made anew: %s", path, error)
    images = make()
    keep(path, lambda temporary: save_file({"images": images}, temporary))
    return images


def _decoded(files: list[File], size: int | None) -> Tensor:
    def read(i: int) -> tuple[Image.Image, int]:
        return Image.open(files[i].path), 0

    return decode(len(files), read, lambda i: files[i].path, size).images


def decode(
    n: int,
    read: Callable[[int], tuple[Image.Image, int]],
    name: Callable[[int], str],
    size: int | None = None,
) -> Split:
    """Images 0 … n − 1 as one tensor, decoded in threads, with a progress bar on a terminal.

    Args:
        n: How many.
        read: i → image and label; called from several threads.
        name: i → what to call the image in a message.
        size: Resize the shorter side to so many pixels (bilinear) and crop the centre.

    Raises:
        InputError: An image that cannot be decoded, or that is not as large as the first one.
    """

    def decode(i: int) -> tuple[np.ndarray, int]:
        try:
            image, label = read(i)
            with image:
                return _pixels(image, size), label
        except InputError:
            raise
        except Exception as error:  # decoders raise whatever they like on a damaged file
            raise InputError(
                f"{name(i)} cannot be decoded ({one_line(error)}); convert or remove it."
            ) from error

    arrays: list[np.ndarray] = []
    labels: list[int] = []
    for array, label in _in_threads(decode, n):
        arrays.append(array)
        labels.append(label)
        if array.shape[:2] != arrays[0].shape[:2]:
            raise InputError(_differ(name(0), arrays[0], name(len(arrays) - 1), array))
    return Split(_stacked(arrays), torch.tensor(labels))


def _in_threads(load: Callable[[int], T], n: int) -> Iterator[T]:
    """one(0), one(1), … one(n − 1), worked on by all cores."""
    from rich.console import Console
    from rich.progress import track

    def some(start: int) -> list[T]:
        return [load(i) for i in range(start, min(start + TASK, n))]

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = chain.from_iterable(pool.map(some, range(0, n, TASK)))
        yield from track(
            results,
            "decoding images",
            total=n,
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _differ(name: str, first: np.ndarray, other_name: str, other: np.ndarray) -> str:
    (h, w), (other_h, other_w) = first.shape[:2], other.shape[:2]
    return (
        f"images differ in size: {name} is {w}×{h} and {other_name} is {other_w}×{other_h}; "
        f"set the option size: {min(h, w)} to resize and crop them."
    )


def _pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """(h, w) for a grey image, (h, w, 3) for a colour one, uint8."""
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode} pixels have more than 8 bits")
    if image.mode.startswith("P"):
        image = image.convert("RGBA")  # a palette's transparency is lost without complaint
    image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if size is not None:
        w, h = image.size
        scale = size / min(w, h)
        w, h = max(size, round(w * scale)), max(size, round(h * scale))
        image = image.resize((w, h), Image.Resampling.BILINEAR)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    """(n, c, h, w); where grey and colour are mixed, grey becomes three equal channels."""
    colour = any(array.ndim == 3 for array in arrays)
    shape = (*arrays[0].shape[:2], 3 if colour else 1)
    views = [np.broadcast_to(a if a.ndim == 3 else a[:, :, None], shape) for a in arrays]
    out = np.empty((len(arrays), shape[2], shape[0], shape[1]), np.uint8)
    np.stack([view.transpose(2, 0, 1) for view in views], out=out)
    return torch.from_numpy(out)

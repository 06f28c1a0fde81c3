"""Weights out of programs that `torch.export.save` wrote (`.pt2`), without running any of it.

`torch.export.load` evaluates the program's expressions and unpickles what it cannot read otherwise.
Here the archive's list of weights is read, and their bytes. Format: torch.export.pt2_archive.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

CONFIG = "data/weights/model_weights_config.json"
WEIGHT_FILES = ("data/weights/model.pt", "serialized_state_dict.pt")  # of older versions of torch
TYPES = {  # numbers of torch's types in the list
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 10: torch.complex64,
    11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def weights(path: Path) -> dict[str, Tensor]:
    """The state_dict of an exported program: tensors of any shape by name, on the CPU.

    Raises:
        ValueError: The file is damaged, or a weight claims more than its bytes.
        pickle.UnpicklingError: A weight is a pickle that would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _weights(archive, path.stat().st_size)
    except (zipfile.BadZipFile, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"it is no exported program: {error}") from None


def _weights(archive: zipfile.ZipFile, limit: int) -> dict[str, Tensor]:
    # All lies in one folder, whose name is the writer's choice; in older versions, in none.
    listed = {str(PurePosixPath(*PurePosixPath(n).parts[1:])): n for n in archive.namelist()}
    listed |= {name: name for name in archive.namelist()}

    def content(name: str) -> bytes:
        if archive.getinfo(listed[name]).file_size > limit:  # torch does not compress
            raise ValueError(f"{name} claims to be larger than the file")
        return archive.read(listed[name])

    for name in WEIGHT_FILES:
        if name in listed:
            return dict(_unpickled(content(name)))
    folder, files = CONFIG.rpartition("/")[0], {}
    weights_by_name = {}
    for name, meta in json.loads(content(CONFIG))["config"].items():
        stored = f"{folder}/{meta['path_name']}"
        if stored not in files:
            files[stored] = content(stored)
        weights_by_name[name] = (
            _unpickled(files[stored])
            if meta["use_pickle"]
            else _tensor(files[stored], meta["tensor_meta"])
        )
    return weights_by_name


def _unpickled(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(content: bytes, meta: dict[str, Any]) -> Tensor:
    """A tensor by its bytes and what the list says of it."""
    sizes, strides = ([entry["as_int"] for entry in meta[key]] for key in ("sizes", "strides"))
    kind = TYPES[meta["dtype"]]
    if math.prod(sizes) * kind.itemsize > len(content):
        raise ValueError(f"{len(content)} bytes are no tensor of {sizes}")
    if not content:
        return torch.empty(sizes, dtype=kind)
    flat = torch.frombuffer(bytearray(content), dtype=kind)
    return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"]).clone()

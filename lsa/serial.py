"""Nested state as safetensors: tensors as they are, everything else as JSON. No pickle, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lsa.errors import InputError


def save(tree: Any, path: Path) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings and tensors to one file."""
    tensors: dict[str, Tensor] = {}
    structure = _pack(tree, tensors)
    save_file(tensors, path, metadata={"structure": json.dumps(structure)})


def load(path: Path) -> Any:
    """Read what `save` wrote, tensors on the CPU.

    Raises:
        InputError: The file is missing, truncated or was not written by `save`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["structure"])
            return _unpack(structure, {key: file.get_tensor(key) for key in file.keys()})
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); make it again") from None


def _pack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        key = str(len(tensors))
        tensors[key] = node.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(node, dict):  # pairs, because optimizer states are keyed by integers
        return {"dict": [[_key(k), _pack(v, tensors)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        return {type(node).__name__: [_pack(v, tensors) for v in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"cannot store a {type(node).__name__} without pickle")


def _key(key: Any) -> int | str:
    if not isinstance(key, int | str):
        raise TypeError(f"cannot store the key {key!r}; only numbers and strings")
    return key


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value}
    items = [_unpack(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items

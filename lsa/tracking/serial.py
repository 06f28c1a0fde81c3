"""Nested state as safetensors: tensors as they are, everything else as JSON. No pickle, no code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lsa.runtime.documents import parse_json
from lsa.runtime.errors import InputError

# In one file. A network has some thousand parameters, and an optimizer three tensors for each; a
# stranger's million of empty ones takes minutes to read.
TENSORS = 100_000


def save(tree: Any, path: Path) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings and tensors to a safetensors file.

    Raises:
        TypeError: The tree holds a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(tree, tensors)
    metadata = {"structure": json.dumps(structure), "sha256": digest(tree)}
    save_file(tensors, path, metadata=metadata)


def load(path: Path) -> Any:
    """Read what `save` wrote, tensors on the CPU.

    Raises:
        InputError: The file is missing, truncated, altered or was not written by `save`.
    """
    stored, metadata = tensors(path)
    try:
        tree = _unpack(parse_json(metadata["structure"], f"the structure in {path}"), stored)
        sha256 = digest(tree)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    if metadata.get("sha256", sha256) != sha256:
        raise _damaged(path, "its content is not what was written")
    return tree


def tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of any shape by name, on the CPU, and the metadata of a safetensors file.

    Raises:
        InputError: The file is missing, truncated, no safetensors, or holds more than `TENSORS`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > TENSORS:
                raise ValueError(f"it holds {len(keys)} tensors, and more than {TENSORS} is none")
            read = {key: file.get_tensor(key) for key in keys}
            return read, file.metadata() or {}
    # Beside its own errors, safetensors passes on those of torch about types and shapes that a
    # header claims.
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"{path} is missing or damaged ({reason}); make it again")


def digest(tree: Any) -> str:
    """SHA-256 of a tree that `save` takes: the same for the same content, in whatever order."""
    hashed = hashlib.sha256()
    _feed(tree, hashed)
    return hashed.hexdigest()


def _feed(node: Any, hashed: Any) -> None:
    if isinstance(node, Tensor):
        values = node.detach().cpu().contiguous()
        hashed.update(f"tensor {values.dtype} {list(values.shape)}\n".encode())
        hashed.update(values.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(node, dict):
        hashed.update(f"dict {len(node)}\n".encode())
        for key in sorted(node, key=lambda key: (type(key).__name__, key)):
            _feed(key, hashed)
            _feed(node[key], hashed)
    elif isinstance(node, list | tuple):
        hashed.update(f"{type(node).__name__} {len(node)}\n".encode())
        for value in node:
            _feed(value, hashed)
    else:
        hashed.update(f"{type(node).__name__} {json.dumps(node)}\n".encode())


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

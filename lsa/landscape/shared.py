"""Tensors of a network that lie in the memory of one of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lsa.runtime.errors import InputError


def check_distinct(model: nn.Module) -> None:
    """Check that no two parameters share memory.

    Raises:
        InputError: They are: a step moves both, while θ would hold each for itself.
    """
    known: dict[tuple[torch.device, int], str] = {}
    for name, p in model.named_parameters():
        if p.is_meta or not p.numel() or p.layout != torch.strided:
            continue
        if (other := known.setdefault((p.device, p.data_ptr()), name)) != name:
            raise InputError(
                f"parameters {other!r} and {name!r} are two tensors in one memory; make them one: "
                f"the same nn.Parameter in both places"
            )


def views_of_parameters(model: nn.Module) -> list[str]:
    """Attributes with tensors, not parameters, that lie in the memory of a parameter.

    Those that a hook computes anew before each pass (pruning, the older weight and spectral norm)
    are none.
    """
    memory = {p.untyped_storage().data_ptr() for p in model.parameters() if _strided(p)}
    views: list[str] = []
    for path, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        anew = {getattr(h, name, None) for h in hooks for name in ("name", "_tensor_name")}
        for name, kept in {**vars(module), **module._buffers}.items():
            tensors = [t for t in tree_leaves(kept) if isinstance(t, Tensor) and _strided(t)]
            tensors = [t for t in tensors if not isinstance(t, nn.Parameter)]
            if name not in anew and any(t.untyped_storage().data_ptr() in memory for t in tensors):
                views.append(f"{path}.{name}".lstrip("."))
    return views


def kept(model: nn.Module, attribute: str) -> list[Any]:
    """The tensors in an attribute of a network, `module.path.name`."""
    path, _, name = attribute.rpartition(".")
    return tree_leaves(getattr(model.get_submodule(path), name, None))


def _strided(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_meta and t.numel() > 0

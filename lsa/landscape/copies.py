"""Copies of a network, also made ready for differentiation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lsa.runtime.errors import InputError


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps results of its last pass (a loss of its experts).

    `deepcopy` refuses them, as they belong to a graph; the copy has their numbers alone.

    Raises:
        InputError: Modules nest deeper than Python's stack reaches.
    """
    results = [t for t in _tensors(model) if not t.is_leaf]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in results})
    except RecursionError:  # a copy takes more of the stack for each module than a forward pass
        raise InputError(
            "the network's modules nest deeper than Python's stack reaches; nest them less deeply, "
            "or make it deeper first: sys.setrecursionlimit(10_000)"
        ) from None


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what else its modules hold."""
    kept = (t for m in model.modules() for t in tree_leaves(list(vars(m).values())))
    return [t for t in kept if isinstance(t, Tensor)]


def prepared(model: nn.Module) -> nn.Module:
    """A copy for differentiation, with the flags of evaluation.

    Its embeddings give dense and whole gradients and write nothing.

    Raises:
        InputError: A row of an embedding is longer than its `max_norm`, or modules nest deeper
            than Python's stack reaches.
    """
    model = duplicate(model)
    check_lengths(model)
    for module, option, value in _plain_embeddings(model):
        setattr(module, option, value)
    for module, training in evaluation_flags(model):
        module.training = training
    return model


def evaluation_flags(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module, and the flag `training` that `model.eval()` would leave it with.

    `eval()` is not called: a class may do more in it, as layers of LoRA that merge their adapters
    into the weights, which flags do not undo. Where a class has its own `train` or `eval`, a twin
    without numbers tells which modules it leaves in training.
    """
    modules = [*model.modules()]
    flags = _evaluated.get(model, [])
    if len(flags) != len(modules):
        flags = _evaluated[model] = _flags(model)
    return [*zip(modules, flags, strict=True)]


_evaluated: WeakKeyDictionary[nn.Module, list[bool]] = WeakKeyDictionary()


def _flags(model: nn.Module) -> list[bool]:
    if isinstance(model, DistributedDataParallel):  # whose copy would open connections
        return [False, *_flags(model.module)]
    plain = [False for _ in model.modules()]
    own = nn.Module
    if all(type(m).train is own.train and type(m).eval is own.eval for m in model.modules()):
        return plain
    try:
        empty = {id(t): t.detach().to("meta") for t in _tensors(model)}
        return [twin.training for twin in copy.deepcopy(model, empty).eval().modules()]
    except Exception:  # it does something that needs numbers
        return plain


def check_lengths(model: nn.Module) -> None:
    """Check that no embedding would change its weights in a forward pass.

    `max_norm` rescales rows in place in every forward pass. It is a constraint on the training and
    no part of L, so the rows that exceed it are refused, and it is left out.

    Raises:
        InputError: A row of an embedding is longer than its `max_norm`.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            lengths = module.weight.detach().norm(module.norm_type, dim=1)
            if (lengths > module.max_norm * (1 + 1e-5)).any():
                raise InputError(
                    f"embedding {name!r} has rows longer than max_norm={module.max_norm:g}, which "
                    "its forward pass would shorten; run the network once on all tokens first"
                )


@contextlib.contextmanager
def whole_gradients(model: nn.Module) -> Iterator[None]:
    """A block in which a network's embeddings are those of a `prepared` copy; nothing is copied."""
    kept = [
        (module, option, value, getattr(module, option))
        for module, option, value in _plain_embeddings(model)
    ]
    try:
        for module, option, value, _ in kept:
            setattr(module, option, value)
        yield
    finally:
        for module, option, _, own in kept:
            setattr(module, option, own)


def _plain_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Embeddings, with options of theirs that are none of L, and the values that leave these out.

    `padding_idx` of an embedding leaves a row out of the gradient, and not out of L; of a bag it
    leaves the row out of L.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield from ((module, "sparse", False), (module, "scale_grad_by_freq", False))
            yield module, "max_norm", None
            if isinstance(module, nn.Embedding):
                yield module, "padding_idx", None

"""Copies of a network, also made ready for differentiation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lsa.runtime.errors import InputError


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps results of its last pass (a loss of its experts).

    `deepcopy` refuses them, as they belong to a graph; the copy has their numbers alone.

    Raises:
        InputError: Modules nest deeper than Python's stack reaches.
    """
    kept = [t for m in model.modules() for t in tree_leaves(list(vars(m).values()))]
    results = [t for t in kept if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in results})
    except RecursionError:  # a copy takes more of the stack for each module than a forward pass
        raise InputError(
            "the network's modules nest deeper than Python's stack reaches; nest them less deeply, "
            "or make it deeper first: sys.setrecursionlimit(10_000)"
        ) from None


def prepared(model: nn.Module) -> nn.Module:
    """A copy for differentiation: embeddings give dense and whole gradients and write nothing.

    `max_norm` rescales rows in place in every forward pass. It is a constraint on the training and
    no part of L, so the rows that exceed it are refused, and it is left out.

    Raises:
        InputError: A row of an embedding is longer than its `max_norm`, or modules nest deeper
            than Python's stack reaches.
    """
    model = duplicate(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        module.sparse = module.scale_grad_by_freq = False  # the latter is none of L
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # which leaves a row out of the gradient, and not out of L
        if module.max_norm is not None:
            lengths = module.weight.detach().norm(module.norm_type, dim=1)
            if (lengths > module.max_norm * (1 + 1e-5)).any():
                raise InputError(
                    f"embedding {name!r} has rows longer than max_norm={module.max_norm:g}, which "
                    "its forward pass would shorten; run the network once on all tokens first"
                )
            module.max_norm = None
    return model


@contextlib.contextmanager
def whole_gradients(model: nn.Module) -> Iterator[None]:
    """A block in which a network's embeddings give dense gradients of L, and nothing is copied.

    A row of padding still has none, as it has in training.

    Raises:
        InputError: An embedding has a `max_norm`.
    """
    options = ("sparse", "scale_grad_by_freq")
    kept = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.max_norm is not None:
            raise InputError(
                f"embedding {name!r} has max_norm={module.max_norm:g}, by which a forward pass "
                "changes weights; leave out batches="
            )
        kept += [(module, option, getattr(module, option)) for option in options]
    try:
        for module, option, _ in kept:
            setattr(module, option, False)
        yield
    finally:
        for module, option, value in kept:
            setattr(module, option, value)

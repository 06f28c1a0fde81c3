"""A few fixed batches, on which the loss around a training's weights is measured."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lsa.landscape import Landscape
from lsa.landscape.batches import moved
from lsa.landscape.derivatives.budget import graph_memory
from lsa.landscape.network import Network, unwrapped
from lsa.landscape.objectives import supervised
from lsa.landscape.terms import Objective
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError
from lsa.watching.evaluation import seeded, seen_in
from lsa.watching.kept import kept_generators
from lsa.watching.undisturbed import undisturbed
from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")
MOST = 8  # batches that are read
PARTS = 8  # equal parts of them, whose gradients tell the noise


class ProbeSet:
    """The loss L(θ) of a model on fixed batches, in evaluation mode, and what is derived of it.

    The model is not copied: θ is put into it for a computation, and everything is as before after
    it.

    Args:
        model: That is trained; DDP and `torch.compile` are looked through.
        weights: That θ is made of.
        batches: As `read` gives them.
        loss: `(outputs, targets) → scalar` for pairs; default cross entropy.
        objective: `(model, batch) → lsa.Terms`, in place of a loss.

    Raises:
        InputError: What `Landscape` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        batches: list[Any],
        loss: Loss | None = None,
        objective: Objective | None = None,
    ) -> None:
        self._model = unwrapped(model)
        self._names = set(weights.names)
        self.spans = weights.spans()
        self._batches = batches
        self._loss: Loss = F.cross_entropy if loss is None else loss
        self._objective = objective
        self.half: torch.dtype | None = None  # in which the network computes, if it does
        self.kinks = False  # whether the network has some
        self._holders = self._model, self._loss, objective
        self._landscape: Landscape | None = None
        self._parts: list[Landscape] = []
        self._given: list[Landscape] = []

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A block of computations after which network and random states are as before.

        Raises:
            InputError: A forward pass changes weights.
        """
        refuse_max_norm(self._model)
        with undisturbed(*self._holders):
            yield

    def ready(self) -> None:
        """Make the landscapes, where the model is now; once.

        Raises:
            InputError: L is another function at every pass.
        """
        if self._landscape is not None:
            return
        landscape = self._made()
        losses: list[float] = []

        def run() -> None:
            losses.append(landscape.loss(landscape.theta))

        try:
            run()  # counts the samples, which is no part of L
            seen = seen_in(self._model, run)
        except InputError as error:
            raise self._explained(error) from error
        self.half, self.kinks = seen.half, seen.kinks
        if seen.draws:
            log.warning(
                "watch: the network draws random numbers when it is evaluated; on batches= it is "
                "measured with the same ones at every pass"
            )
            self._objective = seeded(self._objective or supervised(self._loss))
            landscape = self._made()
            run()
            run()
        first, second = losses[-2:]
        alike = math.isclose(first, second, rel_tol=1e-2 if seen.half else 1e-5)
        if not alike and math.isfinite(first + second):
            raise InputError(
                f"two passes over batches= give the losses {first:.6g} and {second:.6g}, so there "
                "is no L: the network or the objective keeps a state from pass to pass; let each "
                "pass start anew, or leave out batches="
            )
        self._landscape = landscape

    def _explained(self, error: InputError) -> InputError:
        """The error of a first pass; of a Hugging Face model on its own batches what to give."""
        own = self._objective is None and hasattr(self._model, "config")
        if not own or not any(isinstance(batch, Mapping) for batch in self._batches):
            return error
        return InputError(
            f"{error}; for the loss of {type(self._model).__name__} itself give "
            "objective=lsa.objectives.hf()"
        )

    def _made(self) -> Landscape:
        """L on all batches; those on parts of them are made beside it."""
        device = next(self._model.parameters()).device
        given = [moved(batch, device) for batch in self._batches]
        pairs = self._objective is None and all(_is_pair(batch) for batch in given)
        parts = parts_of(given)
        chosen = {"copy": False, "parameters": lambda name, _: name in self._names}
        if pairs:
            x, y = (torch.cat(tensors) for tensors in zip(*given, strict=True))
            landscape = Landscape(self._model, x, y, self._loss, **chosen)
            self._given = [landscape.with_data(*batch) for batch in given]
            self._parts = [landscape.with_data(*part) for part in parts]
        else:
            options = {"loss": self._loss, "objective": self._objective, **chosen}
            options["memory"] = graph_memory(device)  # the batches are the same at every product
            landscape = Landscape(self._model, given, device=device, **options)
            self._given = [landscape.with_data([batch]) for batch in given]
            self._parts = [landscape.with_data([part]) for part in parts]
        return landscape

    def landscape(self) -> Landscape:
        """L on all batches, of the network as it is now."""
        assert self._landscape is not None
        return self._now(self._landscape)

    def parts(self) -> list[Landscape]:
        """L on each of some parts of equal size; fewer than three where there are none."""
        return [self._now(part) for part in self._parts]

    def given(self) -> list[Landscape]:
        """L on each of the batches as they were given."""
        return [self._now(batch) for batch in self._given]

    def _now(self, landscape: Landscape) -> Landscape:
        """A landscape with the buffers that the network has now, which are put back after use."""
        network = Network(self._model, landscape.network.names, keeps_mode=True)
        return landscape.changed(network=network)


def refuse_max_norm(model: nn.Module) -> None:
    """Check that no embedding has a `max_norm`, which is no part of L: a step goes beyond it.

    Raises:
        InputError: One has.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise InputError(
                f"embedding {name!r} has max_norm={module.max_norm:g}, by which a forward pass "
                "changes weights; leave out batches="
            )


def read(batches: Iterable[Any]) -> list[Any]:
    """Copies of the batches of a probe set: at most eight are read.

    A training may shuffle its data in place, or a loader fill the same tensors again.

    Args:
        batches: Any iterable of them, or one pair of tensors.

    Raises:
        InputError: There is none.
    """
    if isinstance(batches, tuple) and all(isinstance(t, Tensor) for t in batches):
        return [_copied(batches)]
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise InputError(f"batches={batches!r} holds no batches; give a list of some")
    with undisturbed(), kept_generators(batches):
        taken = [_copied(batch) for batch in itertools.islice(batches, MOST)]
    if not taken:
        raise InputError("batches= gives no batch; give a list of at least one")
    return taken


def _copied(batch: Any) -> Any:
    """A copy of a batch; of what lets no copy be made, itself."""
    memo: dict[int, Any] = {}
    held = [*_tensors(batch)]  # of a mapping that makes them when asked, too: ids are used again
    for t in held:  # deepcopy takes all of the memory that a tensor is a view of
        memo[id(t)] = t.detach().clone().requires_grad_(t.requires_grad)
    try:
        return copy.deepcopy(batch, memo)
    except Exception:  # of an object of another library, which may raise anything
        return batch


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(part)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and [type(t) for t in batch] == [Tensor, Tensor]


def _length(batch: Any) -> int | None:
    """Samples of a batch, where all its tensors are equally long."""
    lengths = {len(t) if t.ndim else 0 for t in tree_leaves(batch) if isinstance(t, Tensor)}
    return lengths.pop() if len(lengths) == 1 else None


def parts_of(batches: list[Any]) -> list[Any]:
    """Parts of equal size, about eight; the batches themselves where they cannot be cut."""
    lengths = [_length(batch) for batch in batches]
    if None in lengths:
        return batches
    size = max(1, sum(n or 0 for n in lengths) // PARTS)
    return [
        part for batch, n in zip(batches, lengths, strict=True) for part in _slices(batch, n, size)
    ]


def _slices(batch: Any, n: int | None, size: int) -> Iterator[Any]:
    for start in range(0, (n or 0) - size + 1, size):
        yield tree_map(lambda t, i=start: t[i : i + size] if isinstance(t, Tensor) else t, batch)

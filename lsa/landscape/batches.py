"""A data set as batches that are read again for every pass over it, never all held at once."""

from __future__ import annotations

import copy
import itertools
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from lsa.runtime.errors import InputError

END = object()


class Batch(NamedTuple):
    """One batch of a data set."""

    index: int
    content: Any  # a pytree, on the device
    rows: Tensor | None  # units of it that are meant; None: all
    mark: tuple  # its fingerprint


@dataclass(frozen=True)
class Count:
    """Number of units and weight of one batch."""

    units: int  # samples, or 1 where samples interact
    weight: float
    fingerprint: tuple


class Batches:
    """Batches of any re-iterable, on a device.

    Args:
        source: A DataLoader, a list, or any other iterable that gives the same batches, in the same
            order, whenever it is read.
        device: Where batches are moved to.

    Raises:
        InputError: An iterator, which can be read only once; from a pass, batches that differ from
            those of the first.
    """

    def __init__(self, source: Iterable[Any], device: torch.device) -> None:
        if not isinstance(source, Iterable):
            raise InputError(
                f"batches are a {type(source).__name__}; give a DataLoader, a list or another "
                "iterable of batches"
            )
        if isinstance(source, Iterator):
            raise InputError(
                f"batches are a {type(source).__name__}, which can be read only once; give a "
                "DataLoader, a list, or an object whose __iter__ starts anew"
            )
        self._source, self.device = source, device
        self._double = False
        self.counts: list[Count] = []  # of all batches, once they have been counted
        self._chosen: Tensor | None = None  # sorted units of the whole that are meant

    def __iter__(self) -> Iterator[Batch]:
        """The batches that hold a unit that is meant."""
        start, index = 0, 0
        for index, content in enumerate(self._read()):
            rows, mark = None, fingerprint(content)
            if self.counts:
                count = self._same(index, mark)
                rows = self._rows(start, count.units)
                start += count.units
                if rows is not None and not len(rows):
                    continue
            yield Batch(index, moved(content, self.device, self._double), rows, mark)
            if self._chosen is not None and start > int(self._chosen[-1]):
                return
        if self.counts and index + 1 != len(self.counts):
            raise InputError(self._other(f"{index + 1} batches for {len(self.counts)} before"))

    def _read(self) -> Iterator[Any]:
        """The source's batches, with random numbers of torch's that are the same at every reading.

        A DataLoader draws the order of a shuffle, seeds of workers and augmentations from them.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            iterator, state = iter(self._source), torch.get_rng_state()
        for number in itertools.count():  # noqa: B007
            with torch.random.fork_rng([]):
                torch.set_rng_state(state)
                content = next(iterator, END)
                state = torch.get_rng_state()
            if content is END:
                break
            yield content
        if number == 0:
            raise InputError("there is no batch; give at least one, from every reading")

    def _same(self, index: int, mark: tuple) -> Count:
        """The count of a batch, checked against the first pass over the batches."""
        if index >= len(self.counts):
            raise InputError(self._other(f"more than {len(self.counts)} batches"))
        if mark != self.counts[index].fingerprint:
            raise InputError(self._other(f"batch {index} has other content or comes later"))
        return self.counts[index]

    @staticmethod
    def _other(what: str) -> str:
        return (
            f"the batches differ from one reading to the next ({what}); L needs fixed data: "
            "shuffle=False, no random augmentation"
        )

    def _rows(self, start: int, units: int) -> Tensor | None:
        if self._chosen is None:
            return None
        inside = (self._chosen >= start) & (self._chosen < start + units)
        return (self._chosen[inside] - start).to(self.device)

    def remarks(self) -> tuple[str, ...]:
        """Notes on samples that a DataLoader leaves out or repeats."""
        loader = self._source
        if not isinstance(loader, DataLoader):
            return ()
        lines = []
        drawn = isinstance(loader.sampler, WeightedRandomSampler | RandomSampler)
        if drawn and loader.sampler.replacement:  # pyright: ignore[reportAttributeAccessIssue]
            lines.append(
                "the loader draws samples with replacement: L is the mean over one such draw, and "
                "errors over the data take its samples for different ones"
            )
        n = len(loader.sampler) if isinstance(loader.sampler, Sized) else 0
        if loader.drop_last and (left := n % (loader.batch_size or 1)):
            lines.append(f"the loader has drop_last: {left} of {n} samples are no part of L")
        return tuple(lines)

    # --- other batches of the same data ----------------------------------------------------------

    def subset(self, units: Tensor) -> Batches:
        """The batches with a selection of units, by their indices `(n,)` in the present one."""
        other = copy.copy(self)
        units = units.cpu().sort().values
        other._chosen = units if self._chosen is None else self._chosen[units]
        return other

    def double(self) -> Batches:
        """The same batches in float64."""
        other = copy.copy(self)
        other._double = True
        return other

    @property
    def chosen(self) -> Tensor | None:
        """Indices `(n,)` of the selected units in the data set, ascending; None: all of them."""
        return self._chosen


class Kept(dict):
    """The values of a `UserDict`, such as a Hugging Face `BatchEncoding`, and the rest of it.

    A pytree, which a `UserDict` is not.
    """

    def __init__(self, values: Any, rest: UserDict) -> None:
        super().__init__(values)
        self.rest = rest


register_pytree_node(
    Kept,
    lambda kept: ([*kept.values()], ([*kept], kept.rest)),
    lambda values, form: Kept(zip(form[0], values, strict=True), form[1]),
)


def original(content: Any) -> Any:
    """A batch as its objective gets it: each `Kept` is what it was made of, with its methods."""
    if isinstance(content, Kept):
        made = copy.copy(content.rest)
        made.data = {key: original(value) for key, value in content.items()}
        return made
    if type(content) is dict:
        return {key: original(value) for key, value in content.items()}
    if type(content) in (tuple, list):
        return type(content)(original(value) for value in content)
    return content


def moved(content: Any, device: torch.device, double: bool = False) -> Any:
    """A batch on a device.

    Args:
        content: A pytree of tensors and NumPy arrays. Mappings come back as dicts, a `UserDict` as
            a dict that `original` undoes, arrays as tensors; values of other types are kept.
        device: Where the tensors go.
        double: Whether floating-point tensors become float64.
    """
    if isinstance(content, np.ndarray):
        content = torch.from_numpy(content)
    if isinstance(content, Tensor):
        wider = double and content.is_floating_point()
        return content.to(device=device, dtype=torch.float64 if wider else content.dtype)
    if isinstance(content, torch.nn.utils.rnn.PackedSequence):
        content = content.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return content.double() if double and content.data.is_floating_point() else content
    if isinstance(content, Mapping):
        values = {key: moved(value, device, double) for key, value in content.items()}
        return Kept(values, rest) if (rest := _rest(content)) is not None else values
    if isinstance(content, tuple) and hasattr(content, "_fields"):
        return type(content)(*(moved(value, device, double) for value in content))
    if isinstance(content, tuple | list):
        return type(content)(moved(value, device, double) for value in content)
    return content.to(device) if hasattr(content, "to") else content


def _rest(content: Mapping) -> UserDict | None:
    """What a `UserDict` is beside its values; None of another mapping."""
    if isinstance(content, Kept):
        return content.rest
    if not isinstance(content, UserDict):
        return None
    rest = copy.copy(content)
    rest.data = {}
    return rest


def cloned(content: Any) -> Any:
    """A copy of a batch's tensors, for a network that writes into its inputs."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, content)


def fingerprint(content: Any) -> tuple:
    """A fingerprint of a batch: shapes, and a weighted sum of each tensor's numbers."""
    marks = []
    tensors = tree_leaves(moved(content, torch.device("cpu")))
    for leaf in (dense for tensor in tensors for dense in _dense(tensor)):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            ramp = torch.linspace(1, 2, len(flat), dtype=torch.float64)
            marks.append((tuple(leaf.shape), float(ramp @ flat.double().nan_to_num(0, 1, -1))))
        elif isinstance(leaf, int | float | str):
            marks.append(leaf)
    return tuple(marks)


def _dense(leaf: Any) -> list[Any]:
    """The dense tensors that hold what a sparse or nested one does; anything else as it is."""
    if not isinstance(leaf, Tensor) or (leaf.layout == torch.strided and not leaf.is_nested):
        return [leaf]
    if leaf.is_nested:
        return [*leaf.unbind()]
    return (
        [*leaf.coalesce().indices(), leaf.coalesce().values()]
        if leaf.is_sparse
        else [leaf.values()]
    )


def cut(inputs: Any, targets: Any, size: int) -> list[tuple[Any, Any]]:
    """Inputs and targets as a list of batches.

    Args:
        inputs: A pytree of tensors `(N, …)`.
        targets: The same for the targets.
        size: Samples per batch; the last one may have fewer.

    Raises:
        InputError: There are no tensors, or they are not equally long.
    """
    both = moved((inputs, targets), torch.device("cpu"))
    lengths = {len(t) for t in tree_leaves(both) if isinstance(t, Tensor) and t.ndim}
    if not lengths:
        raise InputError(
            "inputs and targets hold no tensors with samples along their first dimension; give "
            "tensors (N, …), or batches"
        )
    if len(lengths) != 1:
        raise InputError(
            f"inputs and targets have {sorted(lengths)} samples; give as many of each, or batches"
        )
    (n,) = lengths
    return [
        tree_map(lambda t, i=i: t[i : i + size] if isinstance(t, Tensor) else t, both)
        for i in range(0, n, size)
    ]

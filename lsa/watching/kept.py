"""What Python objects hold besides weights: taken before a block, and put back after it."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

Restore = Callable[[], None]

MANY = 1000  # things in a list, beyond which they are not looked at one by one
LARGE = 1 << 26  # numbers of a tensor, beyond which it is not copied unless it is a buffer
DEEP, MOST = 16, 10_000  # objects in each other, and in all, that a source of batches is made of
CONTAINERS = {list, deque, set, dict, OrderedDict, defaultdict, Counter}
FUNCTIONS = types.FunctionType | types.MethodType | functools.partial
GENERATORS = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
PLAIN = Tensor | np.ndarray | types.ModuleType | type | str | bytes | int | float | None
OF_MODULES = {*vars(nn.Module())} - {"training"}  # torch's own attributes


@contextlib.contextmanager
def kept(*holders: Any) -> Iterator[None]:
    """A block after which modules hold what they held before it: buffers and attributes.

    Tensors, lists and mappings get their contents again, generators their states. Parameters are
    left alone, and so is what is inside of objects of other classes.

    Args:
        *holders: Modules, and functions or objects that are called, of which the modules and
            generators count that they hold: in a closure, as attributes, or by a global name.
    """
    seen: dict[int, Any] = {}  # things by their id, which are kept so that none is given twice
    with contextlib.ExitStack() as stack:  # which goes on where one of them fails
        for holder in holders:
            for restore in _of_called(holder, seen):
                stack.callback(restore)
        yield


def _of_called(holder: Any, seen: dict[int, Any]) -> Iterator[Restore]:
    """What puts back the contents of something that is called."""
    if isinstance(holder, nn.Module | GENERATORS):
        yield from _of(holder, seen)
    elif id(holder) not in seen and holder is not None:
        seen[id(holder)] = holder
        for part in _parts(holder):
            if isinstance(part, nn.Module | GENERATORS | FUNCTIONS):
                yield from _of_called(part, seen)


def _parts(holder: Any) -> list[Any]:
    """What a function is made of, or the attributes of another object."""
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values()]
    if isinstance(holder, types.MethodType):
        owner = holder.__self__
        held = [owner] if isinstance(owner, nn.Module) else _parts(owner)
        return [holder.__func__, *held]
    if not isinstance(holder, types.FunctionType):
        held = getattr(holder, "__dict__", None)
        return [*held.values()] if isinstance(held, dict) else []
    named = [holder.__globals__.get(name) for name in holder.__code__.co_names]
    held = [*(holder.__defaults__ or ()), *(g for g in named if not isinstance(g, FUNCTIONS))]
    for cell in holder.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing is in it yet
            held.append(cell.cell_contents)
    return held


def _of(value: Any, seen: dict[int, Any]) -> Iterator[Restore]:
    """What puts back the contents of a value."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        if value.numel() <= LARGE:
            yield from _of_tensor(value)
    elif isinstance(value, np.ndarray):
        if value.size <= LARGE and value.flags.writeable and not value.dtype.hasobject:
            yield functools.partial(np.copyto, value, value.copy())
    elif isinstance(value, GENERATORS):
        yield from _of_generator(value)
    elif isinstance(value, nn.Module):
        yield from _of_module(value, seen)
    elif isinstance(value, tuple) or type(value) in CONTAINERS:
        if not isinstance(value, tuple):
            yield _of_container(value)
        if len(value) <= MANY:
            for item in value.values() if isinstance(value, dict) else list(value):
                yield from _of(item, seen)


def _of_module(module: nn.Module, seen: dict[int, Any]) -> Iterator[Restore]:
    buffers = module._buffers
    yield _of_container(buffers)
    for buffer in buffers.values():
        if buffer is not None and id(buffer) not in seen:
            seen[id(buffer)] = buffer
            yield from _of_tensor(buffer)
    yield from _of_attributes(module, seen)
    for child in module._modules.values():
        if child is not None:
            yield from _of(child, seen)


def _of_attributes(holder: Any, seen: dict[int, Any]) -> Iterator[Restore]:
    """What puts back attributes and their contents."""
    held = getattr(holder, "__dict__", {})
    own = {name: value for name, value in held.items() if name not in OF_MODULES}

    def restore() -> None:
        for name in [n for n in held if n not in own and n not in OF_MODULES]:
            del held[name]
        held.update(own)

    yield restore
    for value in own.values():
        yield from _of(value, seen)


def _of_tensor(tensor: Tensor) -> Iterator[Restore]:
    if isinstance(tensor, nn.Parameter) or tensor.is_inference():
        return
    version, copy = tensor._version, tensor.detach().clone()

    def restore() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(copy)

    yield restore


def _of_container(container: Any) -> Restore:
    """What puts back the things in a list, set or mapping."""
    table = isinstance(container, dict)
    own = [*container.items()] if table else [*container]

    def restore() -> None:
        now = [*container.items()] if table else [*container]
        same = len(now) == len(own) and all(map(_same, now, own))
        if not same:
            container.clear()
            if isinstance(container, dict):
                for key, value in own:  # the update() of a Counter would count them
                    container[key] = value
            elif isinstance(container, set):
                container.update(own)
            else:
                container.extend(own)

    return restore


def _same(a: Any, b: Any) -> bool:
    """Whether two things are one, or two pairs of the same things."""
    pairs = type(a) is type(b) is tuple and len(a) == len(b) == 2
    return a is b or (pairs and a[0] is b[0] and a[1] is b[1])


def _of_generator(generator: Any) -> Iterator[Restore]:
    """What puts back the state of a generator of torch, NumPy or Python."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        yield functools.partial(generator.set_state, generator.get_state())  # pyright: ignore
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        yield functools.partial(setattr, bits, "state", bits.state)
    elif not isinstance(generator, random.SystemRandom):  # which has none
        yield functools.partial(generator.setstate, generator.getstate())


# --- sources of batches --------------------------------------------------------------------------


_OF_WORKERS = ("persistent_workers", "_iterator")


@contextlib.contextmanager
def kept_generators(source: Any) -> Iterator[None]:
    """A block that reads a source of batches and leaves its generators as they were.

    They are looked for in all that it holds: samplers, data sets, transforms, collating functions.
    A DataLoader whose workers persist has others within, for the state of a worker is its own.

    Args:
        source: A DataLoader, or any other object.
    """
    with contextlib.ExitStack() as stack:
        for found in [*_reached(source)]:
            if isinstance(found, GENERATORS):
                for restore in _of_generator(found):
                    stack.callback(restore)
            elif isinstance(found, DataLoader):
                held = vars(found)
                own = {name: held[name] for name in _OF_WORKERS if name in held}
                stack.callback(held.update, own)
                held.update(persistent_workers=False, _iterator=None)
        yield


def _reached(source: Any) -> Iterator[Any]:
    """An object and those that it holds, through attributes, lists and mappings, each once."""
    waiting, seen = deque([(source, 0)]), {}
    while waiting and len(seen) < MOST:
        value, depth = waiting.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if depth < DEEP:
            waiting.extend((v, depth + 1) for v in _held(value) if not isinstance(v, PLAIN))


def _held(value: Any) -> Iterable[Any]:
    """What an object holds."""
    if isinstance(value, GENERATORS):
        return ()
    if isinstance(value, tuple | set | dict | list | deque):
        things = value.values() if isinstance(value, dict) else value
        return [*things] if len(value) <= MANY else ()
    return _parts(value)

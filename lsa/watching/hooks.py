"""An optimizer's own hooks: what a training does around each step, seen and not changed."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lsa.runtime.errors import InputError
from lsa.watching.undisturbed import in_measurement

T = TypeVar("T")
NEAR = 20  # calls from a GradScaler's to the hooks of the optimizer, at most
STEPS = sys.modules[Optimizer.__module__].__file__  # where torch goes through hooks of steps


class Watcher(Protocol):
    """Who is told; no method may raise unless the training shall end."""

    def begins(self) -> bool:
        """The first optimizer is about to step; False: its gradients need not be told."""
        ...

    def has_gradients(self, optimizer: Optimizer, loss: Any, *, closure: bool) -> None:
        """An optimizer has the gradients that it will use; `loss` is what a closure has given."""

    def ends(self) -> None:
        """The last optimizer has stepped."""


def uncompiled(call: Callable[..., T]) -> Callable[..., T]:
    """The same function, which `torch.compile` leaves alone where it compiles what calls it.

    A compiled step calls the hooks of its optimizer, and would compile the measurements with it.
    """
    return torch.compiler.disable(call)  # pyright: ignore[reportReturnType]


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The same method, which does nothing and keeps nothing once its object is gone.

    For hooks on parameters and nodes: Python does not see what these hold, and would keep a network
    for ever that holds them and is held by them.
    """
    known = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (method := known()) is not None:
            method(*args)

    return call


class OnModule:
    """A hook on a module of the training, which may copy or pickle its network while it is watched.

    The copy's hook does nothing and is of the standard library, so that it is read without lsa.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """Tell what the hook was made for."""
        self._call(*args)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside of Lightning's, Accelerate's and other wrappers.

    One that steps by itself and calls hooks, as Lookahead, is none of these.
    """
    while isinstance(inside := getattr(optimizer, "optimizer", None), Optimizer):
        if getattr(type(optimizer).step, "hooked", False):
            break
        optimizer = inside
    return optimizer


def scaler_above() -> Any:
    """The GradScaler that has the optimizer at hand step; None where there is none.

    Trainers and Accelerate hold it where a user does not see it, and a plain loop need not tell it.
    """
    frame, file = sys._getframe(), sys.modules[GradScaler.__module__].__file__
    for _ in range(NEAR):
        frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code.co_filename == file:
            return next((v for v in frame.f_locals.values() if isinstance(v, GradScaler)), None)
    return None


def steps_of(optimizer: Optimizer) -> int:
    """How many of an optimizer's steps are being made by this thread, one within the other."""
    frame, found = sys._getframe(), 0
    while frame is not None:
        code = frame.f_code
        if code.co_filename == STEPS and "wrapper" in code.co_name:
            found += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


def _is_part(optimizer: Optimizer) -> bool:
    """Whether the step at hand is a part of one that is told already.

    A class may call the `step()` of its base class, and torch has put its hooks on both where an
    optimizer of the base class was ever made.
    """
    own = (vars(c).get("step") for c in type(optimizer).__mro__)
    return sum(hasattr(step, "hooked") for step in own) > 1 and steps_of(optimizer) > 1


class _StepHook:
    """A hook of an optimizer; torch raises where one is taken off while it goes through them.

    So a hook that is removed within a step stays and does nothing.
    """

    def __init__(self, optimizer: Optimizer, register: Any, call: Callable[..., Any]) -> None:
        self._optimizer, self._call = optimizer, call
        self._handle = register(optimizer, uncompiled(self._called))

    def _called(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        off = self._call is None or (not in_measurement() and _is_part(optimizer))
        return None if off else self._call(optimizer, args, kwargs)  # pyright: ignore

    def remove(self) -> None:
        """Take it off."""
        self._call = None
        if not steps_of(self._optimizer):
            self._handle.remove()


def attach(optimizers: Sequence[Optimizer], watcher: Watcher) -> list[Any]:
    """Hooks on some optimizers that step one after the other; their handles have `remove()`.

    One step goes from the first optimizer's beginning to the last one's end. An optimizer that is
    given a closure (LBFGS, SAM, Lightning) has its gradients when the closure has run for the first
    time, so the closure is wrapped to tell.

    Raises:
        InputError: From a step that an objective makes while it is measured, which changes nothing.
    """
    first, last = optimizers[0], optimizers[-1]
    has_gradients = uncompiled(watcher.has_gradients)  # what calls it may be compiled
    awake = True

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        nonlocal awake
        if in_measurement():
            raise InputError(
                "the objective steps the training's optimizer; give one that only computes a loss"
            )
        if optimizer is first:
            awake = watcher.begins()
        if not awake:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure) or isinstance(closure, torch.nn.Module):
            has_gradients(optimizer, None, closure=False)
            return None
        told = _Telling(closure, lambda loss: has_gradients(optimizer, loss, closure=True))
        if "closure" in kwargs:
            return args, {**kwargs, "closure": told}
        return (args[0], told, *args[2:]), kwargs

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        watcher.ends()

    handles = [_StepHook(o, Optimizer.register_step_pre_hook, before) for o in optimizers]
    return [*handles, _StepHook(last, Optimizer.register_step_post_hook, after)]


class _Telling:
    """A closure that tells what it has returned when it was first called.

    In all else it is the closure: optimizers call some with arguments, and look at attributes.
    """

    def __init__(self, closure: Callable[..., Any], tell: Callable[[Any], None]) -> None:
        vars(self).update(__wrapped__=closure, _tell=tell)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the closure returns."""
        loss = self.__wrapped__(*args, **kwargs)
        tell = vars(self).pop("_tell", None)
        if tell is not None:
            tell(loss)
        return loss

    def __getattr__(self, name: str) -> Any:
        """An attribute of the closure."""
        return getattr(vars(self)["__wrapped__"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the closure."""
        setattr(self.__wrapped__, name, value)


def take_off(handles: Sequence[Any], parameters: Sequence[Tensor]) -> None:
    """Take hooks off parameters: torch would call into an empty table at every backward pass."""
    for handle in handles:
        handle.remove()
    for p in parameters:
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(p, table) is not None and not getattr(p, table):
                setattr(p, table, None)


class Backward:
    """Tells when a backward pass has ended and all gradients are there, reduced ones too.

    A hook on a parameter asks autograd to call back at its end, and from there once more: the
    reductions of DistributedDataParallel end in between. All parameters have the hook, for a pass
    may use any of them; those after the first do next to nothing.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], tell: Callable[[], None]) -> None:
        self._tell, self._waiting = tell, False
        self._parameters = [p for p in parameters if p.is_leaf]
        self._hook, self._ended = uncompiled(weakly(self._seen)), uncompiled(weakly(self._at_end))
        self._again = uncompiled(weakly(self._once_more))
        self._handles: list[Any] = []

    def listen(self, on: bool) -> None:
        """Put the hooks on, or take them off."""
        if on == bool(self._handles):
            return
        take_off(self._handles, self._parameters)
        some = [p for p in self._parameters if p.requires_grad] if on else []
        self._handles = [p.register_post_accumulate_grad_hook(self._hook) for p in some]

    def reset(self) -> None:
        """Wait for a backward pass again: one that raised never came to its end."""
        self._waiting = False

    def _seen(self, _: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            self._queue(self._again)

    def _once_more(self) -> None:
        self._queue(self._ended)

    @staticmethod
    def _queue(call: Callable[[], None]) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(call)  # pyright: ignore

    def _at_end(self) -> None:
        self._waiting = False
        self._tell()

"""Losses and objectives by name: lsa's, those of `torch.nn`, or your own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import objectives
from lsa.landscape.terms import Objective
from lsa.project import factories
from lsa.runtime.errors import InputError

DEFAULT = "cross_entropy"
Loss = Callable[[Tensor, Tensor], Tensor]


def build(name: str = DEFAULT, *, trusted: Collection[str] = (), **options: Any) -> Loss:
    """The loss `(outputs, targets) → scalar`, a mean over a batch.

    Args:
        name: `cross_entropy`, a loss of `torch.nn` such as `MSELoss`, or `package.module:name`: a
            class or a function without required arguments makes the loss; a function of outputs
            and targets is the loss.
        trusted: Top-level packages whose code may run.
        **options: Of the class or function.

    Raises:
        InputError: Unknown name or option, or a package that is not trusted.
    """
    label = f"loss {name}"
    if name == DEFAULT and not options:
        return F.cross_entropy
    known = {key: value for key, value in vars(nn).items() if key.endswith("Loss")}
    function: Callable[..., Any]
    if ":" in name:
        function = factories.load(name, nn.Module, trusted)
    elif name in (DEFAULT, *known):
        function = known["CrossEntropyLoss" if name == DEFAULT else name]
    else:
        hint = factories.nearest(name, [DEFAULT, *known])
        raise InputError(
            f"unknown loss {name!r}.{hint} Known are {DEFAULT}, the losses of torch.nn, and "
            "package.module:factory."
        )
    return _made(label, function, options)


READY = {"hf": objectives.hf, "per_token": objectives.per_token}


def objective(name: str, *, trusted: Collection[str] = (), **options: Any) -> Objective:
    """The objective `(model, batch) → Terms`.

    Args:
        name: `hf`, `per_token` (`lsa.landscape.objectives`), or `package.module:name`: a function
            of the model and a batch, or what makes one.
        trusted: Top-level packages whose code may run.
        **options: Of the function.

    Raises:
        InputError: Unknown name or option, or a package that is not trusted.
    """
    if name not in READY and ":" not in name:
        raise InputError(
            f"unknown objective {name!r}.{factories.nearest(name, READY)} Known are "
            f"{', '.join(READY)}, and package.module:function."
        )
    function = READY.get(name) or factories.load(name, nn.Module, trusted)
    return _made(f"objective {name}", function, options)


def _made(label: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """The result of calling a class, or a function that needs no arguments; else the object itself.

    Raises:
        InputError: An option that it does not have, or something that cannot be called.
    """
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if isinstance(function, type) or len(required) < 2:
        checked = factories.check_options(label, function, options)
        try:
            made = function(**checked)
        except Exception as error:  # torch's classes raise whatever they like
            if isinstance(error, InputError) or factories.is_own(label.rpartition(" ")[2]):
                raise
            reason = factories.one_line(error)
            raise InputError(f"{label} cannot be made: {reason}; choose others.") from error
    else:
        names = [p.name for p in required[:2]]
        checked = factories.check_options(label, function, options, names)
        made = functools.partial(function, **checked) if checked else function
    if isinstance(made, nn.Module) and type(made).forward is nn.Module.forward:
        raise InputError(f"{label} computes nothing: its class has no forward; choose another.")
    if not callable(made):
        raise InputError(f"{label} made a {type(made).__name__}; it must return a function.")
    return cast(Loss, made)

"""Optimizers by name.

Every optimizer is driven the same way, `optimizer.step(closure)`, where the closure zeroes the
gradients, computes the loss, calls `backward` and returns the loss.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.project import factories
from lsa.runtime.errors import InputError, first_line
from lsa.training.muon import Muon
from lsa.training.sharpness_aware import SAM

FUSED = ("SGD", "Adam", "AdamW")  # of `torch.optim`, whose CPU kernels too update in one pass
FORMS = {"fused", "foreach", "capturable", "differentiable"}  # options by which a user chooses


def step(optimizer: Optimizer, closure: Callable[[], Any]) -> None:
    """One step by a closure that computes the gradient.

    Raises:
        InputError: The optimizer does not call it, or has failed before.
    """
    called, name = False, f"{type(optimizer).__name__}.step"

    def noted() -> Any:
        nonlocal called
        called = True
        return closure()

    try:
        optimizer.step(noted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if called:
            raise
        raise InputError(
            f"{name} fails before it has called the closure that makes the gradient "
            f"({type(error).__name__}: {first_line(error)}); let it call the closure first, as "
            "those of torch.optim do"
        ) from error
    if not called:
        raise InputError(
            f"{name} does not call the closure that it is given, so there is no gradient; let it "
            "do so first, as those of torch.optim do"
        )


def build(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    trusted: Collection[str] = (),
    **options: Any,
) -> Optimizer:
    """The optimizer `name` over `parameters`.

    Those of `FUSED` read and write a parameter once a step, unless the options say otherwise: on a
    CPU a third of the time for AdamW and 0.6 for SGD with momentum.

    Args:
        name: A class of `torch.optim`, `SAM`, `Muon`, or `package.module:Class`.
        parameters: In the order of the network, as `model.parameters()` gives them, or as groups.
        trusted: Top-level packages whose classes may be imported.
        **options: Of the named class; for `SAM` also those of its `base`.

    Raises:
        InputError: Unknown name or option, a value that the optimizer refuses, or a class that
            is not trusted.
    """
    if name == "SAM":
        checked = factories.check_options("optimizer SAM", _sam, options, ("parameters", "trusted"))
        return _sam(parameters, trusted, **checked)
    label = f"optimizer {name}"
    make = _class(name, trusted)
    first = next(iter(inspect.signature(make).parameters))  # takes the parameters, is no option
    checked = factories.check_options(label, make, options, (first,))
    if isinstance(rate := checked.get("lr"), int | float) and rate < 0:
        raise InputError(f"{label}: lr={rate} is negative; choose a learning rate ≥ 0.")
    given = list(parameters)
    if name in FUSED and not FORMS & checked.keys():
        checked["fused"] = all(isinstance(p, Tensor) and p.is_floating_point() for p in given)
    try:
        optimizer = make(given, **checked)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise InputError(f"{label} refuses ({given}): {factories.one_line(error)}.") from error
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"{label} is a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    return optimizer


def restored(
    name: str,
    stored: Mapping[str, Any],
    model: nn.Module,
    *,
    trusted: Collection[str] = (),
    **options: Any,
) -> Optimizer:
    """The optimizer over a network with the state that `state_dict` returned.

    Args:
        name: As for `build`.
        stored: The state. Groups that name their parameters (`param_names`, as torch does for
            named parameters) are over these; else one group is over all of the network.
        model: The network.
        trusted: Top-level packages whose classes may be imported.
        **options: Of the named class.

    Raises:
        InputError: As `build` raises, or the state is of another network or not there.
    """
    named = dict(model.named_parameters())
    groups = [dict(group) for group in stored.get("param_groups", [])]
    names = [group.pop("param_names", None) for group in groups]
    parameters: list[Any] = list(named.values())
    if names and all(names) and all(n in named for own in names for n in own):
        parameters = [{"params": [named[n] for n in own]} for own in names]
    optimizer = build(name, parameters, trusted=trusted, **options)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in groups] != sizes:
        raise InputError(
            f"the checkpoint keeps no state of {name} over the {len(named)} parameters of its "
            "network; train again with lsa train, or register it with optimizer=…"
        )
    built = [dict(group) for group in optimizer.param_groups]
    # A copy, because torch shares the tensors, and whoever steps another from them would change it.
    optimizer.load_state_dict(copy.deepcopy({**stored, "param_groups": groups}))
    for usual, group in zip(built, optimizer.param_groups, strict=True):
        _check_group(name, usual, group)
    return optimizer


def _check_group(name: str, usual: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Refuse a stored parameter group that lacks an option, or has text in place of a number."""
    for key, own in usual.items():
        value = group.get(key)
        pairs = [(own, value)]
        if isinstance(own, tuple) and isinstance(value, tuple | list) and len(value) == len(own):
            pairs = list(zip(own, value, strict=True))
        numbers = all(
            isinstance(given, int | float | Tensor)
            for wanted, given in pairs
            if type(wanted) in (int, float, tuple)
        )
        if key not in group or not numbers:
            raise InputError(
                f"the checkpoint's group of {name} has {key}={value!r}, which torch never writes; "
                "train again"
            )


def switch(optimizer: Optimizer, *, training: bool) -> None:
    """Call `train()` or `eval()` of an optimizer that has them.

    Schedule-free ones evaluate at the average x of their steps and take gradients at another point
    y (Defazio et al. 2024, arXiv 2405.15682, §4); the two calls move the parameters between them.
    """
    change = getattr(getattr(optimizer, "base", optimizer), "train" if training else "eval", None)
    if callable(change):
        change()


def _class(name: str, trusted: Collection[str]) -> Callable[..., Any]:
    if ":" in name:
        return factories.load(name, Optimizer, trusted)
    if name == "SparseAdam":
        raise InputError(
            "optimizer SparseAdam needs sparse gradients, which these networks do not have; "
            "choose Adam or AdamW."
        )
    known = classes()
    if name not in known:
        hint = factories.nearest(name, known)
        raise InputError(
            f"unknown optimizer {name!r}.{hint} Known are {', '.join(sorted(known))}, and "
            "package.module:Class."
        )
    return known[name]


def classes() -> dict[str, type[Optimizer]]:
    """Every optimizer that has a name of its own."""
    of_torch = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer)
    }
    known = of_torch | {"Muon": Muon, "SAM": SAM}
    del known["Optimizer"], known["SparseAdam"]
    return known


def _sam(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    trusted: Collection[str],
    base: str = "SGD",
    rho: NonNegativeFloat = 0.05,
    **options: Any,
) -> SAM:
    if base in ("SAM", "LBFGS"):
        raise InputError(
            f"optimizer SAM: base={base!r} evaluates the loss itself; choose one that steps from "
            "one gradient, such as SGD."
        )
    return SAM(build(base, parameters, trusted=trusted, **options), rho)

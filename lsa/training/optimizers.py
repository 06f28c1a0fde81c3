"""Optimizers by name.

Every optimizer is driven the same way, `optimizer.step(closure)`, where the closure zeroes the
gradients, computes the loss, calls `backward` and returns the loss.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.project import factories
from lsa.runtime.errors import InputError

FUSED = ("SGD", "Adam", "AdamW")  # of `torch.optim`, whose CPU kernels too update in one pass
FORMS = {"fused", "foreach", "capturable", "differentiable"}  # options by which a user chooses
Fraction = Annotated[float, Field(ge=0, lt=1)]


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


class SAM(Optimizer):
    """Sharpness-aware minimisation: the base optimizer's step from ∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖).

    Foret et al. 2021, algorithm 1 with p = 2; ρ = 0.05 is the value that implementations start
    from. The norm runs over all parameters. State and parameter groups *are* those of the base
    optimizer, so a schedule and `state_dict` see one optimizer, with `rho` in each group. A step
    costs two gradients, and batch norm, in training mode, sees both.

    Args:
        base: Takes the step; must be able to do so from one gradient, without a closure.
        rho: Radius ρ of the neighbourhood, ≥ 0.
    """

    def __init__(self, base: Optimizer, rho: float = 0.05) -> None:
        self.base = base
        super().__init__(base.param_groups, {"rho": rho})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`, that of the base optimizer included."""
        self.base.load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """One step; evaluates `closure` twice and returns the loss at θ, the unperturbed point."""
        with torch.enable_grad():
            loss = closure()
        graded = [
            (p, group["rho"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.stack([p.grad.norm() for p, _ in graded]).norm()
        # A copy, because (θ + ε) − ε is not θ in floating point.
        theta = [p.clone() for p, _ in graded]
        try:
            for p, rho in graded:
                p.add_(p.grad * (rho / norm.clamp_min(1e-12)))
            with torch.enable_grad():
                closure()
        finally:
            for (p, _), original in zip(graded, theta, strict=True):
                p.copy_(original)
        self.base.step()
        return loss


class Muon(Optimizer):
    """Muon on the hidden weights, AdamW on everything else (Jordan et al. 2024).

    θ ← (1 − ηλ) θ − η √max(1, m/n) · NS(g + μ-momentum): the momentum of an m × n weight,
    orthogonalised by Newton–Schulz iteration. As its authors prescribe, convolutions count as
    matrices of shape (out, in · height · width), and the first weight, the last weight (the
    classifier's), biases and gains belong to AdamW. Defaults are those of the authors' README.

    Args:
        params: Of the network, in its order, from which first and last are known.
        lr: η for the hidden weights, in units of spectral norm per step.
        momentum: μ, an exponential average.
        nesterov: Look one step ahead.
        ns_steps: Newton–Schulz iterations.
        weight_decay: λ, decoupled, for all parameters.
        adamw_lr: AdamW's learning rate.
        adamw_betas: AdamW's averaging constants.

    Raises:
        InputError: The network has no hidden weight.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: NonNegativeFloat = 0.02,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        weight_decay: NonNegativeFloat = 0.01,
        adamw_lr: NonNegativeFloat = 3e-4,
        adamw_betas: tuple[Fraction, Fraction] = (0.9, 0.95),
    ) -> None:
        params = list(params)
        hidden = hidden_weights(params)
        chosen = {id(p) for p in hidden}
        rest = {
            "params": [p for p in params if id(p) not in chosen],
            "lr": adamw_lr,
            "betas": adamw_betas,
        }
        self.adamw = torch.optim.AdamW([rest], weight_decay=weight_decay)
        own = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(hidden, {**own, "weight_decay": weight_decay})
        # One optimizer to the outside: AdamW works on the second group and in the same state.
        self.param_groups += self.adamw.param_groups
        self._share()

    def _share(self) -> None:
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, AdamW's state with it."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is not None:
                self._step(p, p.grad, group)
        self.adamw.step()
        return loss

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(average, group["momentum"]) if group["nesterov"] else average
        update = orthogonalised(ahead.flatten(1), group["ns_steps"])
        scale = math.sqrt(max(1, update.shape[0] / update.shape[1]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)


def hidden_weights(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The weights of a network, in its order, that belong to Muon itself.

    Raises:
        InputError: There are none.
    """
    hidden = [p for p in parameters if p.ndim >= 2][1:-1]
    if not hidden:
        raise InputError(
            "optimizer Muon works on hidden weights, and this network has none between its "
            "first and its last layer; choose AdamW."
        )
    return hidden


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al. 2024


def orthogonalised(G: Tensor, steps: int) -> Tensor:
    """Roughly UVᵀ of G = USVᵀ, shape `(m, n)`, by quintic Newton–Schulz iteration in bfloat16.

    X ← aX + (bA + cA²)X with A = XXᵀ. The coefficients (Jordan et al. 2024) are steepest at zero
    and do not converge: singular values end between about 0.5 and 1.5, by intent.
    """
    a, b, c = NEWTON_SCHULZ
    X = G.bfloat16()
    X = X / X.norm().clamp_min(1e-7)
    wide = X.shape[0] <= X.shape[1]
    X = X if wide else X.T  # the smaller of the two possible A
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.T

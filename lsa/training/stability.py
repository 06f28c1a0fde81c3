"""The curvature that an optimizer can bear: its preconditioner P, and where its steps diverge.

An optimizer that divides by P moves as if the Hessian were P⁻¹H. Whether it converges on a
quadratic depends on the largest eigenvalue of P⁻¹(H + λI), with λ the L2 penalty that is added to
the gradient. `lsa.training.preconditioners` has the source and the rule of each class.

If all parameters have the same threshold T, as with one group, P is that of the rules, and
eigenvalues are in units of 1/η. Otherwise (groups with rates of their own, Muon with AdamW) each
part of P is multiplied by its own T, and the common threshold is 1. That is exact for a convex
quadratic with P at rest: the first mode to grow, one that changes its sign in every step, appears
where an eigenvalue of this P⁻¹(H + λI) passes 1.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.project.factories import one_line
from lsa.runtime.errors import InputError
from lsa.training import (  # noqa: F401
    collection_rules,
    further_rules,
    muon_state,
    optimizers,
    preconditioners,
    torch_rules,
)
from lsa.training.preconditioners import Preconditioner, Rule
from lsa.training.twin import twin_of


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """An optimizer after its last step, over the parameters that θ is made of.

    Args:
        optimizer: Of torch or derived from it; it is not changed.
        parameters: The trainable parameters in θ's order, themselves, as the optimizer holds them.
        batch_size: Samples per step, where known.
    """

    optimizer: Optimizer
    parameters: Sequence[nn.Parameter]
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """Name of the optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def learning_rate(self) -> float:
        """η of the last step; of the first group where there are several."""
        own = {id(p) for p in self.parameters}
        group = next(
            g for g in self.optimizer.param_groups if not own.isdisjoint(map(id, g["params"]))
        )
        steps = (int(self._state(p).get("step", 0)) for p in group["params"])
        return torch_rules.decayed(group, next(steps))

    def _state(self, parameter: Tensor) -> Mapping[str, Any]:
        return self.optimizer.state.get(parameter, {})  # [parameter] would make an entry

    @functools.cached_property
    def _read(self) -> tuple[list[Rule | None], list[str], str]:
        """The rule of each parameter, None of one that stands still; notes; why there are none."""
        reader, notes = preconditioners.reader_of(self.optimizer)
        if reader is None:
            return [], [], notes[0]
        # Some keep options for all groups as their own attributes.
        own = {k: v for k, v in vars(self.optimizer).items() if isinstance(v, int | float | str)}
        groups = {
            id(p): {**own, **group}
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        rules: list[Rule | None] = []
        for p in self.parameters:
            group = groups.get(id(p))
            rule = None if group is None else reader(p, group, self._state(p))
            if isinstance(rule, str):
                return [], notes, f"{self.name} has no preconditioner: {rule}"
            rules.append(rule)
        if any(rule and rule.P is not None for rule in rules):
            rules = [rule if rule and rule.P is not None else None for rule in rules]
        still = sum(p.numel() for p, r in zip(self.parameters, rules, strict=True) if r is None)
        if still:
            notes = [*notes, f"{still} parameters are not moved by {self.name}: P⁻¹ is 0 there"]
        if any(group.get("train_mode") for group in self.optimizer.param_groups):
            notes = [*notes, f"{self.name} is in train mode: call its eval() for averaged weights"]
        return rules, notes, ""

    @property
    def _moving(self) -> list[Rule]:
        return [rule for rule in self._read[0] if rule]

    @property
    def notes(self) -> list[str]:
        """Notes for the reader of the numbers."""
        return self._read[1]

    @property
    def reason(self) -> str:
        """Why there is no preconditioner; empty where there is one."""
        if self._read[2]:
            return self._read[2]
        if all(rule.P is None for rule in self._moving):
            return f"{self.name} has not stepped yet, so there is no preconditioner"
        if not self.common and any(rule.threshold is None for rule in self._moving):
            return f"a group of {self.name} has no threshold, so the groups have no common P"
        return ""

    @property
    def common(self) -> bool:
        """Whether all parameters have one threshold, in units of 1/η."""
        return len({(rule.threshold, rule.formula) for rule in self._moving}) == 1

    @property
    def threshold(self) -> tuple[float, str] | None:
        """Largest eigenvalue of P⁻¹(H + λI) that does not diverge while P stands still.

        With its formula. None where it is not known, or where the learning rate is 0.
        """
        thresholds = [rule.threshold for rule in self._moving]
        if getattr(self.optimizer, "maximize", False) or None in thresholds or not thresholds:
            return None
        if not self.common:
            return 1.0, "1, since the rates of the groups are in P"
        value = thresholds[0]
        return None if value is None or math.isinf(value) else (value, self._moving[0].formula)

    @property
    def penalty(self) -> float | Tensor:
        """λ of the L2 penalty λ|θ|²/2 that the optimizer adds to the loss; `(d,)` where it varies.

        0 where weight decay is decoupled.
        """
        values = [rule.penalty if rule else 0.0 for rule in self._read[0]] or [0.0]
        if len(set(values)) == 1:
            return float(values[0])
        sizes = torch.tensor([_local(p).numel() for p in self.parameters])
        each = torch.tensor(values, dtype=torch.float64).repeat_interleave(sizes)
        return each.to(self.parameters[0].device)

    @property
    def identity(self) -> bool:
        """Whether P is 1 and λ one number, so that P⁻¹(H + λI) is H + λI."""
        ones = all(
            rule and isinstance(rule.P, Tensor) and (_local(rule.P) == 1).all()
            for rule in self._read[0]
        )
        return self.common and ones and isinstance(self.penalty, float) and not self.reason

    def preconditioner(self, theta: Tensor) -> Preconditioner | None:
        """P of the last step, an operator on `(d,)` on θ's device; None if there is a `reason`.

        Of parameters that processes share (DTensors), it is that of this process's part.

        Raises:
            InputError: A P that is not positive or not finite.
        """
        if self.reason:
            return None
        pieces: list[Tensor] = []
        operators: list[tuple[slice, Preconditioner, float]] = []
        end = 0
        for p, rule in zip(self.parameters, self._read[0], strict=True):
            part = slice(end, end := end + p.numel())
            P = None if rule is None else rule.P
            share = 1.0 if rule is None or self.common else rule.threshold or 1.0
            if isinstance(P, Preconditioner):
                operators.append((part, P, share**-0.5))
                diagonal = P.diagonal
            elif P is None:
                still = theta.new_full((_local(p).numel(),), math.inf, dtype=torch.float64)
                pieces.append(still)
                continue
            else:
                diagonal = _local(P).reshape(-1).double()
            if not (torch.isfinite(diagonal) & (diagonal > 0)).all():
                raise InputError(
                    f"the second moment of {self.name} is not positive and finite everywhere, so "
                    "it preconditions nothing; train again with a larger eps or a lower rate"
                )
            pieces.append(diagonal.to(theta.device) * share)
        P_diagonal = torch.cat(pieces)
        scale = P_diagonal.rsqrt()

        def inverse_root(v: Tensor) -> Tensor:
            w = scale * v
            for part, P, root in operators:
                piece = v[part].to(P.diagonal)  # of the optimizer, perhaps on another device
                w[part] = (root * P.inverse_root(piece)).to(w)
            return w

        return Preconditioner(P_diagonal, inverse_root, not operators)

    def update(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """The change of θ in the optimizer's next step with a gradient, `(d,)`.

        A copy in float64 steps, because (θ + u) − θ is not u in floating point. An optimizer with
        averaged weights that is in `eval` mode steps from its training point, but with the gradient
        at θ.

        Raises:
            InputError: It makes no step from a gradient: SAM, for one, evaluates the loss itself.
        """
        try:
            return self._step(theta, gradient)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"{self.name} makes no step ({one_line(error)})") from None

    def _step(self, theta: Tensor, gradient: Tensor) -> Tensor:
        twin, own = twin_of(self.optimizer, self.parameters)
        averaging = any(group.get("train_mode") is False for group in twin.param_groups)
        sizes = [p.numel() for p in self.parameters]
        with torch.no_grad():
            for p, at in zip(own, theta.split(sizes), strict=True):
                p.copy_(at.view_as(p))
            if averaging:
                optimizers.switch(twin, training=True)
        for p, slope in zip(own, gradient.split(sizes), strict=True):
            p.grad = slope.view_as(p).to(p, copy=True)  # some optimizers write into it
        _step_from_gradients(twin, own)
        if averaging:
            optimizers.switch(twin, training=False)
        u = torch.empty_like(theta)
        for p, at, part in zip(own, theta.split(sizes), u.split(sizes), strict=True):
            p.grad = None
            part.copy_(p.detach().reshape(-1).to(theta.device) - at.double())
        return u


def _step_from_gradients(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """A step from the gradients that the parameters have.

    Raises:
        RuntimeError: It evaluates the loss more than once, or at other weights, as SAM does.
    """

    def state() -> list[Any]:
        """Sums, which change when the weights or the gradients do."""
        both = [t for p in parameters for t in (p.detach(), p.grad)]
        return [None if t is None else t.sum().item() for t in both]

    before, evaluations = state(), 0

    def closure() -> Any:
        """The gradient is there already."""
        nonlocal evaluations
        evaluations += 1
        if evaluations > 1:
            raise RuntimeError("it evaluates the loss more than once")
        if state() != before:
            raise RuntimeError("it evaluates the loss at other weights, or without the gradient")
        return parameters[0].new_zeros(())

    takes_closure = len(inspect.signature(optimizer.step).parameters) > 0
    optimizer.step(*[closure] * takes_closure)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


def read(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], batch_size: int | None = None
) -> OptimizerState:
    """The state of an optimizer over the parameters of θ, matched by identity.

    Args:
        optimizer: Of any class; wrappers such as Lightning's and Accelerate's are looked into.
        parameters: The network's trainable ones, in its order: those that the optimizer was given.
        batch_size: Samples per step.

    Raises:
        InputError: It is no optimizer, or moves none of these parameters.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer; give the "
            "optimizer that trained the network"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, parameters)):
        raise InputError(
            f"{type(optimizer).__name__} moves none of the network's {len(parameters)} trainable "
            "parameters; make the landscape of the model that the optimizer was made for"
        )
    return OptimizerState(optimizer, parameters, batch_size)


def stability_threshold(name: str, options: Mapping[str, Any]) -> tuple[float, str] | None:
    """Largest λ_max of the loss at which full-batch steps on a quadratic do not diverge.

    That of `OptimizerState.threshold` less the L2 penalty, where P is the identity. A diagnostic,
    never a criterion: full-batch training hovers about it, mini-batch training keeps the full-batch
    λ_max below it, and neither is wrong.

    Args:
        name: As for `optimizers.build`.
        options: Of the optimizer; the rest are torch's defaults.

    Returns:
        The threshold in units of the loss and its formula, or None where raw λ_max has none: that
        of an adaptive or normalised method holds for the Hessian as its preconditioner changes it.
    """
    if name != "SGD":
        return None
    value, formula = torch_rules.momentum_edge(options, float(options.get("lr", 1e-3)))
    if value is None or math.isinf(value):
        return None
    if penalty := options.get("weight_decay", 0):
        return value - penalty, f"{formula} − weight decay"
    return value, formula

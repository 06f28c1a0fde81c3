"""The curvature that an optimizer can bear: its preconditioner P, and where its steps diverge.

An optimizer that divides by P moves as if the Hessian were P⁻¹H, and what decides on a quadratic
whether it converges is the largest eigenvalue of P⁻¹(H + λI), with λ the L2 penalty that is coupled
to the gradient (Cohen et al. 2022, "Adaptive gradient methods at the edge of stability",
arXiv 2207.14484). Decoupled weight decay is no part of the gradient: it lowers the threshold.

θ is flat, shape `(d,)`: the optimizers of this module act on each parameter by itself, but for a
common number of steps. Muon, which acts on matrices, is in `muon_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsa.runtime.errors import InputError
from lsa.training import optimizers

DIAGONAL = ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW")  # whose preconditioner is one
KNOWN = (*DIAGONAL, "Muon")


@dataclass(frozen=True)
class Preconditioner:
    """P, symmetric and positive, in float64."""

    diagonal: Tensor  # of P, (d,)
    inverse_root: Callable[[Tensor], Tensor]  # v ↦ P^(−½)v


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer after its last step."""

    name: str  # one of `DIAGONAL`
    options: Mapping[str, Any]  # of its parameter group, `lr` as of the last step
    state: Mapping[str, Tensor]  # name in torch → (d,); averages that it does not keep are absent
    steps: int  # taken
    batch_size: int  # samples per step

    @property
    def learning_rate(self) -> float:
        """η of the last step."""
        rate = float(self.options["lr"])
        return rate / (1 + max(self.steps - 1, 0) * self.options.get("lr_decay", 0.0))

    @property
    def penalty(self) -> float:
        """λ of the L2 penalty λ|θ|²/2 that the optimizer adds to the loss; 0 where decoupled."""
        return 0.0 if _decoupled(self.name, self.options) else float(self.options["weight_decay"])

    @property
    def threshold(self) -> tuple[float, str] | None:
        """Largest eigenvalue of P⁻¹(H + λI) that does not diverge while P stands still."""
        return _threshold(self.name, {**self.options, "lr": self.learning_rate})

    def preconditioner(self, theta: Tensor) -> Preconditioner | None:
        """P as of the last step; None before the first step.

        The step is θ ← θ − η P⁻¹m, m the gradient or its (undivided) average. Adam's correction
        for the start of its averages belongs to P: P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε).

        Raises:
            InputError: A second moment that is negative or not finite.
        """
        if self.name == "SGD":
            return diagonal(torch.ones_like(theta, dtype=torch.float64))
        if not self.steps:
            return None
        P = self._root().to(theta.device) + self.options["eps"]
        if "betas" in self.options:
            P = P * (1 - float(self.options["betas"][0]) ** self.steps)
        if not (torch.isfinite(P) & (P > 0)).all():
            raise InputError(
                f"the second moment of {self.name} is not positive and finite everywhere, so it "
                "preconditions nothing; train again with a larger eps or a lower learning rate"
            )
        return diagonal(P)

    def _root(self) -> Tensor:
        """The root of the second moment, without ε."""
        state = {name: value.double() for name, value in self.state.items()}
        if self.name == "Adagrad":
            return state["sum"].sqrt()
        if self.name == "RMSprop":
            centre = state["grad_avg"].square() if self.options["centered"] else 0.0
            return (state["square_avg"] - centre).sqrt()
        moment = state["max_exp_avg_sq" if self.options["amsgrad"] else "exp_avg_sq"]
        return (moment / (1 - float(self.options["betas"][1]) ** self.steps)).sqrt()

    def update(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """What torch's own optimizer adds to θ in its next step with a gradient, `(d,)`."""
        # In float64, because (θ + u) − θ is not u in floating point.
        moved = nn.Parameter(theta.detach().double().clone())
        optimizer = optimizers.build(self.name, [moved])
        group = {**self.options, "params": [0]}
        kept = {name: value.double().clone() for name, value in self.state.items()}
        if kept:
            kept["step"] = torch.tensor(float(self.steps))
        optimizer.load_state_dict({"state": {0: kept} if kept else {}, "param_groups": [group]})
        moved.grad = gradient.to(moved)
        optimizer.step()
        return (moved.detach() - theta.double()).to(theta.dtype)


def diagonal(P: Tensor) -> Preconditioner:
    """A diagonal preconditioner, from its diagonal."""
    scale = P.rsqrt()
    return Preconditioner(P, lambda v: scale * v)


def read(
    name: str, stored: Mapping[str, Any], parameters: Sequence[nn.Parameter], batch_size: int
) -> OptimizerState:
    """The state of an optimizer over the trainable parameters, from its `state_dict`.

    Args:
        name: Class, as for `optimizers.build`.
        stored: What `state_dict` returned.
        parameters: All of the network, in its order.
        batch_size: Samples per step.

    Raises:
        InputError: An optimizer that divides by no diagonal, or a state that is not there,
            not whole or of another network.
    """
    if name not in DIAGONAL:
        raise InputError(
            f"optimizer {name} has no preconditioner that is known here, so its stability cannot "
            f"be told; choose a checkpoint of {', '.join(KNOWN)}"
        )
    groups = stored.get("param_groups", [])
    if len(groups) != 1 or len(groups[0]["params"]) != len(parameters):
        raise InputError(
            f"the checkpoint keeps no state of {name} over the {len(parameters)} parameters of its "
            "network; train again with lsa train, which keeps it"
        )
    kept = [
        (p, {k: v for k, v in stored["state"].get(i, {}).items() if v is not None})
        for i, p in zip(groups[0]["params"], parameters, strict=True)
        if p.requires_grad
    ]
    names = dict.fromkeys(key for _, entries in kept for key in entries)
    steps = {int(entries.get("step", 0)) for _, entries in kept}
    if len(steps) > 1 or any(entries.keys() != names.keys() for _, entries in kept):
        raise InputError(
            f"{name} has not stepped all trainable parameters equally often, so it has no common "
            "preconditioner; freeze those without a gradient and train again"
        )
    names.pop("step", None)
    flat = {
        key: torch.cat([entries[key].reshape(-1).to(p) for p, entries in kept]) for key in names
    }
    options = {key: value for key, value in groups[0].items() if key != "params"}
    return OptimizerState(name, options, flat, steps.pop(), batch_size)


# --- thresholds ----------------------------------------------------------------------------------


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
    found = _threshold(name, options) if name == "SGD" else None
    penalty = options.get("weight_decay", 0)
    if found is None or not penalty:
        return found
    return found[0] - penalty, f"{found[1]} − weight decay"


def _decoupled(name: str, options: Mapping[str, Any]) -> bool:
    """Whether weight decay is a step of its own and no part of the gradient."""
    return name == "AdamW" or bool(options.get("decoupled_weight_decay"))


def _threshold(name: str, options: Mapping[str, Any]) -> tuple[float, str] | None:
    """Threshold of the largest eigenvalue of P⁻¹(H + λI), P frozen, and its formula.

    Gradient descent 2/η; torch's heavy ball 2(1+β)/η and Nesterov 2(1+β)/(η(1+2β)) (Cohen et al.
    2021, arXiv 2103.00065); the average of Adam (2 + 2β₁)/((1 − β₁)η), 38/η at β₁ = 0.9 (Cohen et
    al. 2022). Decoupled weight decay is a factor 1 − ηλ on θ: it makes a 2 − ηλ of the 2.
    """
    rate = float(options.get("lr", 1e-3))
    if options.get("maximize") or not rate > 0:
        return None
    if name in ("Adam", "AdamW"):
        beta = float(options["betas"][0])
        decay = rate * options["weight_decay"] if _decoupled(name, options) else 0.0
        if not decay < 2:
            return None
        value = (2 - decay) * (1 + beta) / ((1 - beta) * rate)
        return value, f"{'(2−ηλ)' if decay else '2'}(1+β₁)/((1−β₁)η)"
    momentum = options.get("momentum", 0)
    if name not in DIAGONAL or options.get("dampening") or not 0 <= momentum < 1:
        return None
    if not momentum:
        return 2 / rate, "2/η"
    if options.get("nesterov"):
        return 2 * (1 + momentum) / (rate * (1 + 2 * momentum)), "2(1+β)/(η(1+2β))"
    return 2 * (1 + momentum) / rate, "2(1+β)/η"

"""The rules of optimizers of other packages, which need not be installed.

`schedulefree` (Defazio et al. 2024, arXiv 2405.15682), `pytorch_optimizer` and `torch_optimizer`
(Shampoo: Gupta et al. 2018, arXiv 1802.09568; SOAP: Vyas et al. 2024, arXiv 2409.11321), and Lion
(Chen et al. 2023, arXiv 2302.06675).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsa.training.preconditioners import Preconditioner, Rule, edge, preconditioner, rotated
from lsa.training.torch_rules import BOUNDED, SIGNS


@preconditioner("schedulefree:SGDScheduleFree", "pytorch_optimizer:ScheduleFreeSGD")
def schedule_free_sgd(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Rule:
    """P = 1; weight decay belongs to the gradient."""
    P = torch.ones_like(parameter, dtype=torch.float64)
    threshold, formula, _ = _schedule_free(group, group["momentum"])
    return Rule(P, threshold, formula, group["weight_decay"])


@preconditioner("schedulefree:AdamWScheduleFree", "pytorch_optimizer:ScheduleFreeAdamW")
def schedule_free_adamw(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Rule:
    """P = √(v/(1 − β₂ᵗ)) + ε; decoupled weight decay λy lowers the threshold by λ."""
    beta1, beta2 = map(float, group["betas"])
    threshold, formula, steps = _schedule_free(group, beta1)
    if threshold is not None and (decay := group["weight_decay"]):
        threshold, formula = threshold - decay, f"{formula} − λ"
        threshold = threshold if threshold > 0 else None
    P = None
    if state:
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
        P = (v / (1 - beta2**steps)).sqrt() + group["eps"]
    return Rule(P, threshold, formula)


def _schedule_free(group: Mapping[str, Any], beta: float) -> tuple[float | None, str, int]:
    """Threshold, its formula and the steps taken.

    z ← z − ηP⁻¹g(y), x ← (1−c)x + cz, y = (1−β)z + βx: an alternating z moves y by
    (1−β+βc/(2−c))z, which is k. c, the weight of the last step in x, is that of the last step.
    """
    steps = int(group.get("k", group.get("step", 0)))
    warm_up = min(1.0, steps / group["warmup_steps"]) if group["warmup_steps"] else 1.0
    rate = float(group["lr"]) * (warm_up if steps else 1.0)
    c = 0.0
    if group["weight_sum"]:
        weight = steps ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        c = float(weight / group["weight_sum"])
    gain = 1 - beta + beta * c / (2 - c)
    return edge(rate, gain), "2/((1−β+βc/(2−c))η)", steps


@preconditioner("pytorch_optimizer:Shampoo", "torch_optimizer:Shampoo")
def shampoo(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """P⁻¹ is a product of powers of one statistic per side, as the optimizer keeps them.

    The momentum μ averages steps and not gradients: v ← P⁻¹((1−μ)g + λθ + μv), θ ← θ − ηv. So it is
    fed back through P⁻¹, and grows by itself where P ≤ μ in some direction. Elsewhere, along each
    w with p = wᵀPw and a = wᵀ((1−μ)H + λ)w, the mode's polynomial pz² − (p + μ − ηa)z + μ has its
    zeros within the unit circle exactly for ηa < 2(p + μ): the threshold 2/η of
    (P + μ)/(1−μ) and λ/(1−μ).
    """
    rate, weight_decay, momentum = float(group["lr"]), group["weight_decay"], group["momentum"]
    P = None
    if state:
        names = [n for n in state if n.startswith(("inv_pre_cond_", "inv_precond_"))]
        powers = [torch.linalg.eigh(state[name].double()) for name in sorted(names)]
        values = torch.ones((), dtype=torch.float64, device=parameter.device)
        for eigenvalues, _ in powers:
            values = values[..., None] * eigenvalues
        if (values > 0).all():  # all zero until the powers are first computed
            if momentum and not (values * momentum < 1).all():
                return (
                    f"its momentum of {momentum} is fed back through P⁻¹, whose largest eigenvalue "
                    f"is {float(values.max()):.3g}: at {1 / momentum:.3g} or more steps grow "
                    "without a gradient, at any rate"
                )
            values = (1 / values + momentum) / (1 - momentum)
            P = rotated(values.view(parameter.shape), [Q for _, Q in powers])
    if not group.get("weight_decouple"):
        return Rule(P, edge(rate), "2/η", weight_decay / (1 - momentum))
    decay = weight_decay * (1.0 if group.get("fixed_decay") else rate)
    return Rule(P, edge(rate, decay=decay), "(2−ηλ)/η" if decay else "2/η")


@preconditioner("pytorch_optimizer:SOAP")
def soap(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """Adam in the eigenbases of Shampoo; decay follows the step: (2−ηλ)(1+β₁)/((1−β₁)(1−ηλ)η).

    With `merge_dims` the bases are those of a tensor of fewer sides, of the same order.
    """
    if group["normalize_gradient"]:
        return "with normalize_gradient its step has the length of the rate, " + BOUNDED
    beta1, beta2 = map(float, group["betas"])
    rate, steps = float(group["lr"]), int(group.get("step", 1)) - 1  # the first only takes measure
    P: Preconditioner | None = None
    if state and steps > 0:
        values = state["exp_avg_sq"].double().sqrt() + group["eps"]
        if group["correct_bias"]:
            values = values * ((1 - beta1**steps) / math.sqrt(1 - beta2**steps))
        P = _merged(values, state["Q"], group)
        if P is None:
            return "of sides that merge_dims makes, more than one is above max_precondition_dim"
    decay = rate * group["weight_decay"]
    gain = (1 - beta1) / (1 + beta1) * (1 - decay)
    formula = "(1+β₁)/((1−β₁)η)"
    if decay:
        formula = "(2−ηλ)(1+β₁)/((1−β₁)(1−ηλ)η)"
    return Rule(P, edge(rate, gain, decay), formula if decay else f"2{formula}")


def _merged(
    values: Tensor, bases: Sequence[Any], group: Mapping[str, Any]
) -> Preconditioner | None:
    """P of SOAP's eigenvalues in the parameter's shape; None where its sides are not known."""
    n, sides = values.numel(), [Q if len(Q) else None for Q in bases]
    if not group["merge_dims"] or values.ndim == 1:
        return rotated(values, sides)
    if sides.count(None) > 1:
        return None
    order = torch.arange(n, device=values.device).view(values.shape)
    if group.get("data_format") == "channels_last" and values.ndim == 4:
        order = order.permute(0, 3, 1, 2)
    order = order.reshape(-1)
    inner = rotated(
        values.reshape(-1)[order].view([-1 if Q is None else len(Q) for Q in sides]), sides
    )
    back = order.argsort()
    return Preconditioner(inner.diagonal[back], lambda v: inner.inverse_root(v[order])[back])


@preconditioner("transformers:Adafactor")
def transformers_adafactor(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Rule:
    """P = √v/α, α the length of the step, so that the threshold is 2 − αλ over the gain of β₁.

    The clipping of large steps is left out. Shazeer & Stern 2018, arXiv 1804.04235.
    """
    P, decay = None, 0.0
    if state:
        if "exp_avg_sq_row" in state:
            row, column = state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()
            v = (row / row.mean(-1, keepdim=True))[..., None] * column[..., None, :]
        else:
            v = state["exp_avg_sq"].double()
        steps, step = int(state["step"]), group["lr"]
        if group["relative_step"]:
            step = min(1e-6 * steps if group["warmup_init"] else 1e-2, steps**-0.5)
        if group["scale_parameter"]:
            step *= max(group["eps"][1], parameter.detach().double().square().mean().sqrt().item())
        P, decay = v.sqrt() / step, step * group["weight_decay"]
    beta = group["beta1"] or 0.0
    formula = "(2−αλ)" if decay else "2"
    formula += "(1+β₁)/(1−β₁), α is in P" if beta else ", α is in P"
    return Rule(P, edge(1.0, (1 - beta) / (1 + beta), decay), formula)


@preconditioner("pytorch_optimizer:Lamb", "pytorch_optimizer:LARS")
def by_layer(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Steps of a length that the layer's weights say."""
    return "each layer's step has a length in proportion to its weights, " + BOUNDED


@preconditioner(
    "lion_pytorch:Lion", "pytorch_optimizer:Lion", "torchao:Lion", "pytorch_optimizer:DeMo"
)
def lion(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Steps by signs."""
    return SIGNS

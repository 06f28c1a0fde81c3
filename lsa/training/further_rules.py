"""The rules of further optimizers of the package `pytorch_optimizer`, which need not be installed.

AdaBelief (Zhuang et al. 2020, arXiv 2010.07468), Prodigy (Mishchenko & Defazio 2023,
arXiv 2306.06101), Sophia (Liu et al. 2023, arXiv 2305.14342), Adafactor (Shazeer & Stern 2018,
arXiv 1804.04235) and Muon. What limits large steps (clipping) is left out: it acts on no small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsa.training.muon_state import averaged_momentum, orthogonalising
from lsa.training.preconditioners import Rule, edge, preconditioner
from lsa.training.torch_rules import averaged

CAUTIOUS = (
    "with cautious=True entries are left out by their sign, so that its step is not in proportion "
    "to the gradient"
)
EXPONENTIAL = "(1+β₁)/((1−β₁)η)"


def _decoupled(group: Mapping[str, Any], rate: float) -> float:
    """The share of θ that decoupled weight decay takes away in a step."""
    if not group["weight_decouple"]:
        return 0.0
    return float(group["weight_decay"]) * (1.0 if group.get("fixed_decay") else rate)


def _rule(P: Any, rate: float, beta: float, decay: float, formula: str, penalty: float) -> Rule:
    gain = (1 - beta) / (1 + beta)
    return Rule(P, edge(rate, gain, decay), f"{'(2−ηλ)' if decay else '2'}{formula}", penalty)


@preconditioner("pytorch_optimizer:AdaBelief")
def adabelief(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """Adam's P with the variance of gradients about their average; with `rectify` RAdam's."""
    if group.get("adanorm"):
        return "with adanorm its step is not in proportion to the gradient"
    beta1, beta2 = map(float, group["betas"])
    steps, rate = int(group.get("step", 0)), float(group["lr"])
    P = None
    if state and steps:
        P = state["max_exp_avg_var" if group["ams_bound"] else "exp_avg_var"].double().sqrt()
        if group["rectify"]:
            share = _rectification(steps, beta2, group)
            if not share:
                return "its rectification takes no step yet; train for more steps"
            P = (P + group["eps"]) / share if share > 0 else torch.ones_like(P)
        else:
            P = P / math.sqrt(1 - beta2**steps) + group["eps"]
        if not group.get("adam_debias"):
            P = (1 - beta1**steps) * P
    decay = _decoupled(group, rate)
    penalty = 0.0 if group["weight_decouple"] else float(group["weight_decay"])
    return _rule(P, rate, beta1, decay, EXPONENTIAL, penalty)


def _rectification(steps: int, beta2: float, group: Mapping[str, Any]) -> float:
    """r of the step η r m/(√v + ε); −1 where the step is η m, 0 where there is none."""
    last = 2 / (1 - beta2) - 1
    rho = last - 2 * steps * beta2**steps / (1 - beta2**steps)
    if rho < group["n_sma_threshold"]:
        return -1.0 if group["degenerated_to_sgd"] else 0.0
    share = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
    return math.sqrt((1 - beta2**steps) * share)


@preconditioner("pytorch_optimizer:Prodigy")
def prodigy(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """P = c(√v/d + ε) at the rate dη: d is the estimated distance, c Adam's corrections.

    Its averages are of d g and d² g². Decay that is coupled to the gradient comes too late for
    them, and has no effect.
    """
    if group["eps"] is None:
        return "with eps=None its step is an arctangent, not in proportion to the gradient"
    beta1, beta2 = map(float, group["betas"])
    steps, distance = int(group["step"]) - 1, float(group["d"])
    rate, correction = distance * float(group["lr"]), 1.0
    if group["bias_correction"] and steps:
        correction = (1 - beta1**steps) / math.sqrt(1 - beta2**steps)
    P = None
    if state and steps:
        P = correction * (state["exp_avg_sq"].double().sqrt() / distance + group["eps"])
    decay = _decoupled(group, rate / correction)
    return _rule(P, rate, beta1, decay, "(1+β₁)/((1−β₁)dη), d its distance", 0.0)


@preconditioner("pytorch_optimizer:SophiaH")
def sophia(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P is the averaged estimate of the Hessian's diagonal, ε where it is smaller or negative."""
    rate = float(group["lr"])
    P = None
    if state and group.get("step"):
        P = state["hessian_moment"].double().clamp_min(group["eps"])
    decay = _decoupled(group, rate)
    penalty = 0.0 if group["weight_decouple"] else float(group["weight_decay"])
    return _rule(P, rate, float(group["betas"][0]), decay, EXPONENTIAL, penalty)


@preconditioner("pytorch_optimizer:AdaFactor")
def adafactor(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """P = √v/α, α the length of the step; the average β₁ is of steps, which is the same."""
    if group.get("cautious"):
        return CAUTIOUS
    P, decay, steps = None, 0.0, int(group.get("step", 0))
    if state and steps:
        if "exp_avg_sq_row" in state:
            row, column = state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()
            v = (row / row.mean(-1, keepdim=True))[..., None] * column[..., None, :]
        else:
            v = state["exp_avg_sq"].double()
        if group["ams_bound"]:  # of which it keeps the largest root, and takes the root of that
            v = state["exp_avg_sq_hat"].double() / max(
                1 - group["betas"][1], steps ** group["decay_rate"]
            )
        step = float(group["lr"])
        if group["relative_step"]:
            step = min(1e-6 * steps if group["warmup_init"] else 1e-2, steps**-0.5)
        if group["scale_parameter"]:
            size = parameter.detach().double().square().mean().sqrt().item()
            step *= max(group["eps2"], size)
        P, decay = v.sqrt() / step, _decoupled(group, step)
    beta = float(group["betas"][0] or 0.0)
    penalty = 0.0 if group["weight_decouple"] else float(group["weight_decay"])
    formula = f"{'(2−αλ)' if decay else '2'}{'(1+β₁)/(1−β₁)' if beta else ''}, α is in P"
    return Rule(P, edge(1.0, (1 - beta) / (1 + beta), decay), formula, penalty)


@preconditioner("pytorch_optimizer:Muon")
def muon(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """That of hidden weights; those of groups with use_muon=False are AdamW's."""
    if group.get("cautious"):
        return CAUTIOUS
    steps, decoupled = int(group.get("step", 0)), bool(group["weight_decouple"])
    penalty = 0.0 if decoupled else float(group["weight_decay"])
    if not group["use_muon"]:
        P, (beta1, beta2) = None, map(float, group["betas"])
        if state and steps:
            v = state["exp_avg_sq"].double() / (1 - beta2**steps)
            P = (1 - beta1**steps) * (v.sqrt() + group["eps"])
        as_torch = {**group, "decoupled_weight_decay": decoupled}
        return averaged(P, as_torch, (1 - beta1) / (1 + beta1), EXPONENTIAL)
    P = None
    if state and steps:
        M = state["momentum_buffer"].double().flatten(1)
        rows, columns = M.shape
        scale = math.sqrt(max(1.0, rows / columns))
        if group["use_adjusted_lr"]:
            scale = 0.2 * math.sqrt(max(rows, columns))
        given, n = group["ns_coeffs"], int(group["ns_steps"])
        P = orthogonalising(M, [given[min(i, len(given) - 1)] for i in range(n)], scale)
    decay = float(group["weight_decay"]) if decoupled else 0.0
    return averaged_momentum(P, {**group, "weight_decay": decay}, penalty)

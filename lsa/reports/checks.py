"""Cross-checks: numbers that different probes must agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from lsa.reports.measurements import Measurement

Numbers = dict[str, float]


@dataclass(frozen=True)
class Check:
    """One agreement that must hold on one checkpoint or pair."""

    subject: str
    seed: int
    text: str
    holds: bool


def checks(measurements: Sequence[Measurement]) -> list[Check]:
    """Every check whose numbers are there, measured on the same samples."""
    found = []
    groups: dict[tuple[str, int], Numbers] = {}
    for m in measurements:
        known = groups.setdefault((m.subject, m.seed), {})
        known.update(m.numbers)
        params = m.done.params
        known[f"{m.step}/samples"] = float(params.get("n_samples", math.nan))
        known[f"{m.step}/probes"] = float(params.get("probes", 0))
    for (subject, seed), known in groups.items():
        for text, holds in _agreements(known):
            found.append(Check(subject, seed, text, holds))
    return found


def _agreements(n: Numbers) -> list[tuple[str, bool]]:
    found = []
    for other, name in (
        ("perturbation/curvature_fit", "fitted"),
        ("sgd_noise/lambda_h", "noise"),
        ("preconditioned/lambda_max_raw", "preconditioned"),
        ("layers/lambda_max", "layers"),
    ):
        if _together(n, "lanczos/lambda_max", other):
            a, b = n["lanczos/lambda_max"], n[other]
            text = f"λ_max {a:.4g} (lanczos) = {b:.4g} ({name}) within 1 %"
            found.append((text, abs(a - b) <= 0.01 * abs(a)))
    for other, name in (("sgd_noise/trace_h", "noise"), ("layers/trace", "layers")):
        if _together(n, "lanczos/trace", other):
            found.append(_same_trace(n, other, name))
    if {"lanczos/lambda_min", "lanczos/remainder_lambda_min"} <= n.keys():
        a, b = n["lanczos/lambda_min"], n["lanczos/remainder_lambda_min"]
        found.append((f"λ_min(H) {a:.4g} ≥ λ_min(H − G) {b:.4g}", a >= b - 0.01 * abs(b)))
    if "auto_neb/bound_margin" in n:
        a, b = n["auto_neb/path_loss"], n["auto_neb/log_classes"]
        text = f"path loss {a:.4g} ≤ max(ends, ln C = {b:.4g})"
        found.append((text, n["auto_neb/bound_margin"] >= -1e-5))
    if "auto_neb/linear_max" in n:
        a, b = n["auto_neb/path_loss"], n["auto_neb/linear_max"]
        found.append((f"path loss {a:.4g} ≤ straight line {b:.4g}", a <= b + 1e-6))
    return found


def _same_trace(n: Numbers, other: str, name: str) -> tuple[str, bool]:
    """Two estimates of tr H from independent probe vectors, by Student's t at 99 %.

    The error of the density's is a bound; that of the other's is the spread of its few probes,
    which sets the degrees of freedom.
    """
    a, b = n["lanczos/trace"], n[other]
    errors = [n.get(f"{key}_se_probes", math.nan) for key in ("lanczos/trace", other)]
    probes = n[f"{other.partition('/')[0]}/probes"]
    allowed = float(stdtrit(max(1, probes - 1), 0.995)) * math.hypot(*errors)
    text = f"tr H {a:.4g} (density) = {b:.4g} ({name}) within {allowed:.2g} (99 %)"
    return text, abs(a - b) <= allowed


def _together(n: Numbers, a: str, b: str) -> bool:
    """Both numbers are there, from equally many samples."""
    samples = [n.get(f"{key.partition('/')[0]}/samples") for key in (a, b)]
    return a in n and b in n and samples[0] == samples[1]

"""Cross-checks: agreements between numbers, as the probes declare them (`@probe(check=…)`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from lsa import probe
from lsa.probe import AtMost, Same
from lsa.reports.measurements import Measurement
from lsa.runtime.documents import whole_number

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
    known_probes, results = probe.modules(), []
    declared = {m.step: probe.find(m.step).check for m in measurements if m.step in known_probes}
    groups: dict[tuple[str, int], Numbers] = {}
    for m in measurements:
        known = groups.setdefault((m.subject, m.seed), {})
        known.update(m.numbers)
        params = m.done.params
        known[f"{m.step}/samples"] = whole_number(params.get("n_samples", "")) or math.nan
        known[f"{m.step}/probes"] = whole_number(params.get("probes", "")) or 0
    for (subject, seed), known in groups.items():
        for step, each in declared.items():
            for text, holds in _agreements(step, each, known):
                results.append(Check(subject, seed, text, holds))
    return results


def _agreements(
    step: str, declared: Sequence[Same | AtMost], n: Numbers
) -> Iterator[tuple[str, bool]]:
    """Agreements of a probe whose numbers were measured: a sentence, and whether it holds."""
    for check in declared:
        if isinstance(check, AtMost):
            yield from _at_most(step, check, n)
        elif _together(n, check.other, f"{step}/{check.metric}"):
            yield _same(step, check, n)


def _at_most(step: str, check: AtMost, n: Numbers) -> Iterator[tuple[str, bool]]:
    own = {key.partition("/")[2]: value for key, value in n.items() if key.startswith(f"{step}/")}
    low, high = (
        own.get(side) if isinstance(side, str) else side for side in (check.low, check.high)
    )
    if low is not None and high is not None:
        allowed = check.relative * abs(low) + check.absolute
        yield check.text.format(**own), low <= high + allowed


def _same(step: str, check: Same, n: Numbers) -> tuple[str, bool]:
    """Two numbers that agree within a share of the first, or within their standard errors.

    Of two estimates from independent random vectors the difference is tested by Student's t at
    99 %. The error of the other probe's is a bound; that of this probe's is the spread of its few
    vectors, which sets the degrees of freedom.
    """
    other, key = check.other.partition("/")[0], f"{step}/{check.metric}"
    a, b = n[check.other], n[key]
    text = f"{check.symbol} {a:.4g} ({other}) = {b:.4g} ({step})"
    if check.within is not None:
        return f"{text} within {100 * check.within:g} %", abs(a - b) <= check.within * abs(a)
    errors = [n.get(f"{name}_se_probes", math.nan) for name in (check.other, key)]
    allowed = float(stdtrit(max(1, n[f"{step}/probes"] - 1), 0.995)) * math.hypot(*errors)
    return f"{text} within {allowed:.2g} (99 %)", abs(a - b) <= allowed


def _together(n: Numbers, a: str, b: str) -> bool:
    """Both numbers are there, from equally many samples."""
    samples = [n.get(f"{key.partition('/')[0]}/samples") for key in (a, b)]
    return a in n and b in n and samples[0] == samples[1]

"""The first screen of a report: what the seeds establish, and what more of them would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from lsa import probe
from lsa.figures import words
from lsa.probe import Same
from lsa.reports.extent import Extent
from lsa.reports.findings import ALONG, Finding, PairFinding
from lsa.reports.insights import Insight
from lsa.reports.statistics.comparison import listed
from lsa.reports.statistics.forecast import MOST, POWER, Forecast, forecast, standardised

SHOWN = 5  # findings on the first screen
ERRORS = (
    "± is half the width of a 95 % interval: over the training seeds, by Student's t; where there "
    "is one seed, two standard errors over the samples, probe vectors or subspaces, which tell "
    "nothing of another seed. (a … b) is a 95 % interval that is not symmetric, > a one without an "
    "upper end. A residual, where it is not negligible, bounds the error of a search."
)


def established(
    claims: Sequence[Insight], findings: Sequence[Finding], pairs: Sequence[PairFinding]
) -> list[str]:
    """Established results as sentences, one for each number, the surest first.

    Args:
        claims: From `insights`.
        findings: From `findings`.
        pairs: From `pair_findings`.
    """
    points = [f"{finding.name}: {finding.claim}" for finding in claims if finding.established]
    best: dict[str, Finding] = {}
    for finding in _once(findings):
        known = best.get(_same(finding.metric))
        if finding.established and (known is None or _strength(finding) > _strength(known)):
            best[_same(finding.metric)] = finding
    points += [sentence(finding) for finding in sorted(best.values(), key=_strength, reverse=True)]
    return points + list(_barriers(pairs))


def _once(findings: Iterable[Finding]) -> list[Finding]:
    """One finding of each pair on a number that two probes measure, such as λ_max and λ_H.

    That is an established one; then one along the trajectories, which needs no model of how the
    number depends on the loss, as ANCOVA does; then that of the probe which the other refers to.
    """

    def rank(finding: Finding) -> tuple[bool, bool, bool]:
        along = finding.matching is not None and finding.matching.method == ALONG
        return finding.established, along, finding.metric == _same(finding.metric)

    chosen: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (_same(finding.metric), finding.comparison.a, finding.comparison.b)
        if key not in chosen or rank(finding) > rank(chosen[key]):
            chosen[key] = finding
    return list(chosen.values())


def _same(metric: str) -> str:
    """The number that it must agree with, where its probe declares one: it is the same finding."""
    step, _, short = metric.partition("/")
    declared = probe.find(step).check if step in probe.modules() else ()
    equal = (c.other for c in declared if isinstance(c, Same) and c.metric == short)
    return next(equal, metric)


def _strength(finding: Finding) -> float:
    return abs(standardised(finding.comparison))


def sentence(finding: Finding) -> str:
    """A finding as a reader would tell it."""
    c = finding.comparison
    other = c.b if c.larger == c.a else c.a
    name = words.quantity(finding.metric)
    flipped = c.larger != c.a
    if c.scale == "ratio":
        ends = [1 / v if flipped else v for v in (c.effect, c.low, c.high)]
        much = f"{ends[0]:.3g} times as large for {c.larger} as for {other}"
    else:
        ends = [-v if flipped else v for v in (c.effect, c.low, c.high)]
        much = f"larger by {ends[0]:.3g} for {c.larger} than for {other}"
    low, high = sorted(ends[1:])
    equal = ""
    if finding.matching is not None and finding.matched is not None:
        factor = 1 / finding.matched.effect if flipped else finding.matched.effect
        equal = f", {factor:.3g} times at equal train loss, {finding.matching.method}"
    doubt = f"; {finding.doubt}" if finding.doubt else ""
    return f"The {name} is {much} (95 %: {low:.3g} … {high:.3g}{equal}; {listed(c.seeds)}{doubt})."


def _barriers(pairs: Sequence[PairFinding]) -> Iterator[str]:
    """One point for each kind of barrier that there is."""
    kinds: dict[str, list[PairFinding]] = {}
    for finding in pairs:
        if finding.level.established:
            kinds.setdefault(finding.metric, []).append(finding)
    for metric, members in kinds.items():
        heights = ", ".join(
            f"{finding.level.subject} ({finding.level.mean:.3g})" for finding in members
        )
        doubt = "; ".join(dict.fromkeys(finding.doubt for finding in members if finding.doubt))
        yield f"There is a {words.quantity(metric)} between {heights}{doubt and f'; {doubt}'}."


def nearest(known: Extent, findings: Sequence[Finding]) -> str:
    """A sentence on the seeds that would settle the finding nearest to being established.

    Args:
        known: What of the project was trained.
        findings: From `findings`.
    """
    limit = "" if known.shared >= known.least else known.limit
    outlooks = [(finding, outlook) for finding in _open(findings) if (outlook := _outlook(finding))]
    if not outlooks:
        few = known.pairs > 0 and known.shared < 3
        forecast_later = " From three seeds on, the report forecasts how many are enough."
        return limit + few * forecast_later
    finding, outlook = min(outlooks, key=lambda pair: pair[1].seeds or MOST + 1)
    if not outlook.seeds:
        far = f"As measured so far, none of the others would be with fewer than {MOST} seeds."
        return f"{limit} {far}".strip()
    more = outlook.seeds - len(finding.comparison.seeds)
    likely = "more than 99" if outlook.power > 0.99 else f"{100 * outlook.power:.0f}"
    return (
        f"Nearest: {sentence(finding)} If the difference and its spread are as measured, "
        f"{outlook.seeds} seeds ({more} more) establish it with a probability of {likely} %."
    )


def _open(findings: Iterable[Finding]) -> list[Finding]:
    """Findings not established whose difference has the same sign in every comparison."""
    return [
        finding
        for finding in _once(findings)
        if not finding.established
        and finding.comparison.larger
        and (
            finding.matching is None
            or (finding.matched and finding.matched.larger == finding.comparison.larger)
        )
    ]


def _outlook(finding: Finding) -> Forecast | None:
    """Seeds with which all comparisons of a finding are established, taken as independent."""
    ways = [finding.comparison, *([finding.matched] if finding.matched else [])]
    open_ways = [way for way in ways if not way.established]
    outlooks = [forecast(way, POWER ** (1 / len(open_ways))) for way in open_ways]
    known = [outlook for outlook in outlooks if outlook]
    if len(known) < len(outlooks):
        return None
    seeds = max(outlook.seeds for outlook in known) if all(o.seeds for o in known) else 0
    return Forecast(seeds, math.prod(outlook.power for outlook in known))

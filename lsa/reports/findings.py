"""Findings of a study: each optimizer against each other on every headline number, by seeds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lsa import probe
from lsa.project import Project
from lsa.reports import doubts
from lsa.reports.artifacts import Trajectory, read_trajectories
from lsa.reports.extent import extent
from lsa.reports.measurements import Measurement, check_alike, step_of, values
from lsa.reports.statistics.comparison import FEWEST, Comparison, Scale, compare
from lsa.reports.statistics.levels import Level, levels
from lsa.reports.statistics.matching import ancova, at_common_loss
from lsa.reports.tables import headline

ALONG, BY_ANCOVA = "along the trajectories", "by ANCOVA"  # methods of a comparison at equal loss


@dataclass(frozen=True)
class Matched:
    """Pairs of optimizers on one number at equal train loss."""

    method: str  # ALONG, BY_ANCOVA, or empty: not matched
    text: str = ""  # what was left out, or why there is none
    comparisons: tuple[Comparison, ...] = ()

    def said(self, matched: Comparison | None) -> str:
        """One of its pairs in words."""
        if matched is None:
            return f"no equal-loss comparison: {self.text}"
        return f"{self.method}: {matched.statement}{'; ' if self.text else ''}{self.text}"

    def of(self, a: str, b: str) -> Comparison | None:
        """The comparison of one pair."""
        return next((c for c in self.comparisons if (c.a, c.b) == (a, b)), None)


@dataclass(frozen=True)
class Finding:
    """One pair of optimizers on one number, of curvature also at equal train loss."""

    metric: str
    comparison: Comparison
    matching: Matched | None = None
    doubt: str = ""  # which of its numbers have not converged

    @property
    def matched(self) -> Comparison | None:
        """The comparison at equal train loss."""
        return self.matching.of(self.comparison.a, self.comparison.b) if self.matching else None

    @property
    def established(self) -> bool:
        """Of curvature: established at the last epoch and at equal train loss, the same way."""
        raw, matched = self.comparison, self.matched
        if self.matching is None:
            return raw.established
        if matched is None:
            return False
        return raw.established and matched.established and raw.larger == matched.larger

    @property
    def verdict(self) -> str:
        """The result of the comparison in a few words."""
        c, matched = self.comparison, self.matched
        if self.established:
            return f"established: larger for {c.larger}"
        ways = [
            f"larger for {comparison.larger} {where}"
            for comparison, where in ((c, "at the last epoch"), (matched, "at equal train loss"))
            if comparison and comparison.established
        ]
        only = " only" if len(ways) == 1 else ""
        said = f": {', '.join(ways)}{only}" if ways else c.shortage
        return f"not established{said}"

    @property
    def at_equal_loss(self) -> str:
        """The comparison at equal train loss, or that there is none."""
        if self.matching is None:
            return ""
        return self.matching.said(self.matched)

    @property
    def sentence(self) -> str:
        """Everything in one plain line."""
        doubt = f" ({self.doubt})" if self.doubt else ""
        if not self.matching:
            return f"{self.comparison.statement}: {self.verdict}{doubt}"
        way = self.at_equal_loss
        beside = f"; {way}" if self.matched is None else f"; at equal train loss, {way}"
        return f"{self.comparison.statement} at the last epoch{beside}: {self.verdict}{doubt}"

    @property
    def content(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "metric": self.metric,
            **asdict(self.comparison),
            "at_equal_loss": asdict(self.matched) if self.matched else None,
            "verdict": self.verdict,
            "doubt": self.doubt,
            "sentence": self.sentence,
        }


def document(setting: Project, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """All comparisons of a project, for JSON."""
    known = extent(measurements)
    return {
        "project": setting.name,
        "optimizers": known.optimizers,
        "seeds": list(known.seeds),
        "seeds_needed": known.least,
        "findings": [finding.content for finding in findings(measurements)],
        "pairs": [finding.content for finding in pair_findings(measurements)],
    }


def _open(metric: str, numbers: Mapping[str, float]) -> bool:
    """Whether only the lower end of a number is known: the others are then those that are small."""
    return metric not in numbers and f"{metric}_low" in numbers


def findings(
    measurements: Sequence[Measurement], trajectories: Sequence[Trajectory] | None = None
) -> list[Finding]:
    """All pairs of optimizers on accuracy, train loss and every headline number.

    A number of curvature is compared at the last epoch and at equal train loss, and a difference is
    established only where both are.

    Args:
        measurements: Of a project.
        trajectories: Of its trainings; None: they are read from the store.

    Raises:
        InputError: Measurements that are not alike: other options or samples.
    """
    trajectories = read_trajectories(measurements) if trajectories is None else trajectories
    results = []
    for metric in headline(measurements):
        step = step_of(metric)
        check_alike(step, [m.done for m in measurements if m.step == step])
        of = values(measurements, metric)
        if len(of) < 2 or any(_open(metric, m.numbers) for m in measurements):
            continue
        pairs = compare(of, scale=scale_of(metric, of))
        matching = None
        if _changing(metric) or any(_recorded(metric, trajectory) for trajectory in trajectories):
            matching = match(metric, list(of), measurements, trajectories)
        results += [
            Finding(metric, pair, matching, doubts.of(step, measurements, (pair.a, pair.b)))
            for pair in pairs
        ]
    return results


def match(
    metric: str,
    names: Collection[str],
    measurements: Sequence[Measurement],
    trajectories: Sequence[Trajectory],
) -> Matched:
    """A number of several optimizers at equal train loss.

    Trajectories give it where training first reached that loss. Without them an analysis of
    covariance adjusts the final numbers (`lsa.reports.statistics.matching`).

    Args:
        metric: Full name of the number.
        names: Optimizers.
        measurements: Of the project.
        trajectories: Of the project.
    """
    of = {k: v for k, v in values(measurements, metric).items() if k in names}
    recorded = [trajectory for trajectory in trajectories if _recorded(metric, trajectory)]
    if recorded:
        short = metric.partition("/")[2]
        losses: dict[str, dict[int, list[float]]] = {}
        numbers: dict[str, dict[int, list[float]]] = {}
        for trajectory in recorded:
            losses.setdefault(trajectory.subject, {})[trajectory.seed] = trajectory.train_loss
            numbers.setdefault(trajectory.subject, {})[trajectory.seed] = trajectory.metrics[short]
        compared, left_out = at_common_loss(losses, numbers)
        text = f"without {'; '.join(left_out)}" if left_out else ""
        pairs = {name: compared.get(name, {}) for name in names}
        return Matched(ALONG, text, tuple(compare(pairs)))
    if scale_of(metric, of) != "ratio":
        return Matched("", "values ≤ 0 have no ratio")
    shared = min((len(by_seed) for by_seed in of.values()), default=0)
    losses_at_end = values(measurements, "final/train_loss")
    if shared < FEWEST or not all(name in losses_at_end for name in of):
        return Matched("", f"no trajectories, and fewer than {FEWEST} seeds with a train loss")
    compared = ancova(of, {name: losses_at_end[name] for name in of})
    return Matched(BY_ANCOVA, comparisons=tuple(compared))


def scale_of(metric: str, of: dict[str, dict[int, float]]) -> Scale:
    """Ratios for positive sizes, differences for shares and for what changes sign."""
    positive = all(v > 0 for by_seed in of.values() for v in by_seed.values())
    return "ratio" if positive and "accuracy" not in metric else "difference"


def _changing(metric: str) -> bool:
    """Whether the probe declares that the number changes during training."""
    step, _, short = metric.partition("/")
    return step in probe.modules() and short in probe.find(step).compare


def _recorded(metric: str, trajectory: Trajectory) -> bool:
    step, _, short = metric.partition("/")
    return trajectory.probe == step and short in trajectory.metrics


@dataclass(frozen=True)
class PairFinding:
    """One number of a pair of checkpoints over the seeds."""

    metric: str
    level: Level
    doubt: str = ""  # whether its numbers have not converged

    @property
    def sentence(self) -> str:
        """Everything in one plain line."""
        verdict = f": {self.level.verdict}" if self.level.verdict else ""
        return f"{self.level.statement}{verdict}" + (f" ({self.doubt})" if self.doubt else "")

    @property
    def content(self) -> dict[str, Any]:
        """Everything, for JSON."""
        judged = {"verdict": self.level.verdict, "doubt": self.doubt, "sentence": self.sentence}
        return {"metric": self.metric, **asdict(self.level), **judged}


def pair_findings(measurements: Sequence[Measurement]) -> list[PairFinding]:
    """Every headline number of the pair probes: its mean, and of a barrier whether there is one.

    A barrier is a largest height and therefore never below 0: only what exceeds 0 by two standard
    errors counts as a barrier at a seed, and nothing where they are not known.

    Raises:
        InputError: Measurements that are not alike: other options or samples.
    """
    results = []
    for metric in headline(measurements, pairs=True):
        step = step_of(metric)
        check_alike(step, [m.done for m in measurements if m.step == step])
        of = values(measurements, metric)
        errors = None
        if metric.partition("/")[2].startswith("barrier"):
            known = values(measurements, f"{metric}_se_data")
            errors = {
                subject: {seed: 2 * known.get(subject, {}).get(seed, math.nan) for seed in by_seed}
                for subject, by_seed in of.items()
            }
        results += [
            PairFinding(metric, level, doubts.of(step, measurements, (level.subject,)))
            for level in levels(of, errors)
        ]
    return results

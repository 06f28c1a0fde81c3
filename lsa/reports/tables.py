"""The headline numbers of a project as tables: training first, then each probe, then the pairs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lsa import probe
from lsa.figures import words
from lsa.reports import doubts
from lsa.reports.extent import extent
from lsa.reports.measurements import Measurement, step_of
from lsa.reports.numbers import written
from lsa.reports.statistics.comparison import listed

TRAINING = ("final/val_accuracy", "final/train_loss")
LEADING = (
    *TRAINING,
    "lanczos/lambda_max",
    "sgd_noise/noise_ratio",
    "auto_neb/path_loss",
    "interpolation/barrier",
)
WORST = {
    "auto_neb/path_loss": "highest loss on the worst path to another",
    "interpolation/barrier": "highest barrier on a straight line to another",
}
MOST = 6  # columns of the leading table


@dataclass(frozen=True)
class Table:
    """One row per optimizer or pair; cells are written with their errors."""

    title: str  # "training" or the probe
    text: str  # what was measured, in one line
    headings: list[str]
    cells: list[list[str]]
    names: list[str]  # full names of the numbers, which are in the last columns
    notes: list[tuple[str, str]]  # of which runs, and the text


def headline(measurements: Sequence[Measurement], *, pairs: bool = False) -> list[str]:
    """Full names of the headline numbers of what was measured, training first."""
    steps = {m.step for m in measurements}
    names = [
        f"{name}/{metric}"
        for name in probe.modules()
        if name in steps and probe.find(name).pair == pairs
        for metric in probe.find(name).headline
    ]
    return names if pairs or "train" not in steps else [*TRAINING, *names]


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """Means with their 95 % intervals over the seeds; of one seed, the number's own error.

    A number that no run has, such as an intrinsic dimension where only one d was trained, has no
    column.
    """
    groups: dict[str, list[str]] = {}
    for name in [*headline(measurements), *headline(measurements, pairs=True)]:
        step = step_of(name)
        known = {name, f"{name}_low"}  # of some only the lower end is known
        if any(m.step == step and known & m.numbers.keys() for m in measurements):
            groups.setdefault(step, []).append(name)
    return [_table(measurements, step, names) for step, names in groups.items()]


def _table(measurements: Sequence[Measurement], step: str, names: list[str]) -> Table:
    runs = [m for m in measurements if m.step == step]
    subjects: dict[str, list[Measurement]] = {}
    for m in runs:
        subjects.setdefault(m.subject, []).append(m)
    planned = len(extent(measurements).seeds)
    cells = []
    for subject, own in subjects.items():
        count = f"{len(own)} of {planned}" if len(own) < planned else str(len(own))
        seeds = [m.seed for m in own]
        cells.append([subject, count, *(cell(own, name, seeds) for name in names)])
    pair = step != "train" and probe.find(step).pair
    training = step == "train"
    short = [name.rpartition("/")[2] for name in names]
    short = [name.replace("_", " ") for name in short] if training else short
    text = "The last epoch, on the whole splits." if training else probe.find(step).summary
    headings = ["optimizers" if pair else "optimizer", "seeds", *short]
    common = "; ".join(doubts.shared(runs))
    text += f" All: {common}." if common else ""
    title = "training" if training else step
    return Table(title, text, headings, cells, names, doubts.others(runs))


def cell(runs: Sequence[Measurement], name: str, seeds: Collection[int] = ()) -> str:
    """A number of one subject over its seeds, and what limits it.

    Args:
        runs: Of the subject.
        name: Full name of the number.
        seeds: Where it is measured on some of these alone, the cell says on which.
    """
    having = [m for m in runs if name in m.numbers]
    if not having:
        return "–"
    lines = [written([m.numbers for m in having], name)]
    if len(having) < len(seeds):
        lines.append(f"{len(having)} of {len(seeds)} seeds ({listed([m.seed for m in having])})")
    doubt = doubts.unconverged(having, name_subjects=False)
    return "\n".join([*lines, doubt] if doubt else lines)


def leading(measurements: Sequence[Measurement]) -> Table:
    """One number or two of each kind, a row per optimizer: what a reader wants first.

    Numbers of pairs count for both, the worst over the others.
    """
    subjects = list(dict.fromkeys(m.subject for m in measurements if m.step == "train"))
    present = {name for m in measurements for name in m.numbers if step_of(name) == m.step}
    names = [name for name in LEADING if name in present]
    known = {step_of(name) for name in names}
    names += [
        metric
        for metric in headline(measurements)
        if step_of(metric) not in known and metric in present
    ]
    cells, names, seeds = [], names[:MOST], extent(measurements).seeds
    for subject in subjects:
        row = [cell(worst(measurements, name, subject), name, seeds) for name in names]
        cells.append([subject, *row])
    headings = ["optimizer", *(f"{title(name)}\n{name}" for name in names)]
    return Table("", "", headings, cells, names, [])


def worst(measurements: Sequence[Measurement], name: str, subject: str) -> list[Measurement]:
    """Runs with a number of an optimizer, one per seed: of several pairs that with the largest.

    Args:
        measurements: Of a project.
        name: Full name of the number.
        subject: The optimizer.
    """
    by_seed: dict[int, Measurement] = {}
    for m in measurements:
        if m.step != step_of(name) or name not in m.numbers or subject not in members(m.subject):
            continue
        if m.seed not in by_seed or m.numbers[name] > by_seed[m.seed].numbers[name]:
            by_seed[m.seed] = m
    return [by_seed[seed] for seed in sorted(by_seed)]


def members(subject: str) -> list[str]:
    """The optimizer, or both of a pair."""
    return subject.split(" – ")


def title(name: str) -> str:
    """Heading of a number in words; of pairs it says that it is the worst."""
    step = step_of(name)
    pair = step in probe.modules() and probe.find(step).pair
    return WORST.get(name, f"worst {words.quantity(name)}") if pair else words.quantity(name)

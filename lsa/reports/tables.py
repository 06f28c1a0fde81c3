"""The headline numbers of a project as tables: training first, then each probe, then the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsa import probe
from lsa.reports.measurements import Measurement, step_of, written

TRAINING = ("final/val_accuracy", "final/train_loss")


@dataclass(frozen=True)
class Table:
    """One row per optimizer or pair; cells are written with their errors."""

    title: str  # "training" or the probe
    text: str  # what was measured, in one line
    headings: list[str]
    cells: list[list[str]]


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
        if any(m.step == step and name in m.numbers for m in measurements):
            groups.setdefault(step, []).append(name)
    return [_table(measurements, step, names) for step, names in groups.items()]


def _table(measurements: Sequence[Measurement], step: str, names: list[str]) -> Table:
    subjects: dict[str, list[Measurement]] = {}
    for m in measurements:
        if m.step == step:
            subjects.setdefault(m.subject, []).append(m)
    cells = [
        [subject, str(len(runs)), *(written([m.numbers for m in runs], name) for name in names)]
        for subject, runs in subjects.items()
    ]
    pair = step != "train" and probe.find(step).pair
    first = "optimizers" if pair else "optimizer"
    training = step == "train"
    short = [name.rpartition("/")[2] for name in names]
    short = [name.replace("_", " ") for name in short] if training else short
    text = "The last epoch, on the whole splits." if training else probe.find(step).summary
    return Table("training" if training else step, text, [first, "seeds", *short], cells)

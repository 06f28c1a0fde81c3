"""What a project's page in MLflow's UI says: numbers in one row, and descriptions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle

from lsa import probe
from lsa.figures.axes import COLOURS
from lsa.project import Project
from lsa.reports import extent, summary
from lsa.reports.measurements import Measurement, newest
from lsa.reports.tables import leading, members, worst
from lsa.tracking import descriptions, headlines


def bring_up(setting: Project, study: str = "") -> None:
    """Bring numbers and descriptions on the trainings' runs and checkpoints up to date.

    A probe logs its own numbers there. This adds those of reused steps and of earlier versions, and
    corrects the largest number of pairs where it has changed.

    Args:
        setting: The project.
        study: Id of the run that holds its report; "" for none.
    """
    everything = newest(setting)
    if not everything:
        return
    table = leading(everything)
    trainings = [m for m in everything if m.step == "train"]
    experiments = list(dict.fromkeys(m.done.experiment for m in trainings))

    def from_own(experiment: str) -> list[str]:
        return [experiment, *(e for e in experiments if e != experiment)]

    subjects = dict.fromkeys(m.subject for m in trainings)
    colours = dict(zip(subjects, cycle(COLOURS), strict=False))  # as in the report
    for training in trainings:
        headlines.bring_up(training.done, _numbers(everything, training))
        own = leading([m for m in everything if m.seed == training.seed])
        rows = [row for row in own.cells if row[0] == training.subject]
        described = _of_training(setting, training)
        text = f"{described}\n\n{_markdown(own.headings, rows)}\n\n{summary.ERRORS}"
        own_first, colour = from_own(training.done.experiment), colours[training.subject]
        descriptions.of_training(training.done, own_first, study, text, colour)
    for optimizer, experiment in {m.subject: m.done.experiment for m in trainings}.items():
        rows = [row for row in table.cells if row[0] == optimizer]
        about = f"Checkpoints of {extent.rule(setting, optimizer)}, a version for each training."
        text = f"{about}\n\n{_markdown(table.headings, rows)}\n\n{summary.ERRORS}"
        descriptions.of_model(setting.name, optimizer, from_own(experiment), study, text)
    about = extent.compared(setting, everything)
    text = f"{about}\n\n{_markdown(table.headings, table.cells)}\n\n{summary.ERRORS}"
    for experiment in experiments:
        descriptions.of_project(from_own(experiment), study, text, table.names)


def _numbers(everything: Sequence[Measurement], training: Measurement) -> dict[str, float]:
    """Every headline number that concerns a training; of pairs the largest loss or barrier."""
    headline_numbers: dict[str, float] = {}
    known = probe.modules()
    mine = [m for m in everything if m.seed == training.seed and m.step in known]
    mine = [m for m in mine if training.subject in members(m.subject)]
    for step in dict.fromkeys(m.step for m in mine):
        declared, runs = probe.find(step), [m for m in mine if m.step == step]
        headline_numbers[f"{step}/converged"] = float(all(m.converged for m in runs))
        for short in declared.headline:
            name = f"{step}/{short}"
            largest = worst(runs, name, training.subject)
            if not largest or (declared.pair and not re.search("loss|barrier", short)):
                continue
            numbers = largest[0].numbers
            ends = (f"{name}_low", f"{name}_high")
            errors = {k: v for k, v in numbers.items() if k.startswith(f"{name}_se_") or k in ends}
            headline_numbers |= {name: numbers[name], **errors}
    return headline_numbers


def _of_training(setting: Project, training: Measurement) -> str:
    """A training in two sentences."""
    rule, long = extent.rule(setting, training.subject), extent.epochs(training)
    return (
        f"{extent.setting_of(setting)}, trained by {rule}{long and f' {long}'} from seed "
        f"{training.seed}. Its numbers are those of its last checkpoint; of pairs "
        "the largest over the other optimizers."
    )


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as MLflow's descriptions take it."""
    heads = [heading.partition("\n")[0].replace("|", "∣") for heading in headings]
    lines = [heads, ["---"] * len(heads), *([c.replace("\n", "; ") for c in r] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

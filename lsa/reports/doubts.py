"""What a reader must know of a number beside its error: convergence, samples, notes of its run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lsa.reports.measurements import Measurement
from lsa.reports.records import notes
from lsa.reports.statistics.comparison import listed


def unconverged(runs: Sequence[Measurement], *, name_subjects: bool = True) -> str:
    """`not converged: sgd (seeds 0, 2)`, or without the names `not converged (seeds 0, 2)`.

    Empty where all have converged.
    """
    failed: dict[str, list[int]] = {}
    for m in runs:
        if not m.converged:
            failed.setdefault(m.subject, []).append(m.seed)
    if not failed:
        return ""
    if not name_subjects:
        (seeds,) = failed.values()
        return f"not converged ({listed(seeds)})" if len(runs) > 1 else "not converged"
    several = len({m.seed for m in runs}) > 1
    each = (f"{name} ({listed(s)})" if several else name for name, s in failed.items())
    return f"not converged: {', '.join(each)}"


def of(step: str, measurements: Sequence[Measurement], subjects: Collection[str] = ()) -> str:
    """`unconverged` of the runs of a step.

    Args:
        step: Of the runs.
        measurements: Of a project.
        subjects: Optimizers or pairs whose runs count; all by default.
    """
    runs = [m for m in measurements if m.step == step and (not subjects or m.subject in subjects)]
    return unconverged(runs)


def shared(runs: Sequence[Measurement]) -> list[str]:
    """Notes that every one of several runs has, or a single one: such as which samples it took."""
    each = [notes(m.done.tags) for m in runs]
    return [text for text in dict.fromkeys(each[0]) if all(text in own for own in each)]


def others(runs: Sequence[Measurement]) -> list[tuple[str, str]]:
    """The other notes: of which runs, and the text."""
    common, lacking = set(shared(runs)), {}
    for m in runs:
        for text in notes(m.done.tags):
            if text not in common:
                lacking.setdefault(text, {}).setdefault(m.subject, []).append(m.seed)
    return [
        ("\n".join(f"{name}, {listed(seeds)}" for name, seeds in of.items()), text)
        for text, of in lacking.items()
    ]

"""What a probe found, as a run of MLflow holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsa.probe import Probe, Result
from lsa.runtime.documents import json_number
from lsa.tracking.checkpoint import Checkpoint
from lsa.tracking.run import Run


def log(opened: Run, probe: Probe, result: Result, sources: Sequence[Checkpoint]) -> None:
    """Log everything in a probe's result under `probe/…`.

    The headline numbers of one checkpoint and their errors are logged on that checkpoint too: they
    are its row in the UI's table of models, which would drown in all of them. Those of a pair are
    not, since they are no property of either.
    """
    name = probe.name
    of_checkpoint: dict[str, float] = {}
    of_run: dict[str, float] = {f"{name}/converged": result.converged}
    for key, metric in result.metrics.items():
        values = of_checkpoint if key in probe.headline and not probe.pair else of_run
        values[f"{name}/{key}"] = metric.value
        for origin, error in metric.errors.items():
            values[f"{name}/{key}_se_{origin}"] = error
    opened.metrics(of_checkpoint, on=sources[0])
    opened.metrics(of_run)
    axes = {curve.x_name: curve.x for curve in result.curves.values()}
    curves = axes | {name: curve.y for name, curve in result.curves.items()}
    for key, values in curves.items():
        opened.curve(f"{name}/{key}", values)
    opened.arrays(result.arrays)
    opened.json(summary(result), f"{name}.json")
    opened.tags({f"lsa.note.{i}": note for i, note in enumerate(result.notes)})
    opened.tags({"lsa.curves": " ".join(f"{name}/{key}" for key in curves)})


def summary(result: Result) -> dict[str, Any]:
    """A result as JSON: all but its arrays."""
    return {
        "metrics": {
            name: {
                "value": json_number(m.value),
                "unit": m.unit,
                "standard_errors": {source: json_number(e) for source, e in m.errors.items()},
            }
            for name, m in result.metrics.items()
        },
        "curves": {
            name: {
                "x_name": c.x_name,
                "x_unit": c.x_unit,
                "y_unit": c.y_unit,
                "x": [json_number(v) for v in c.x],
                "y": [json_number(v) for v in c.y],
                "y_standard_error": None if c.error is None else [json_number(v) for v in c.error],
            }
            for name, c in result.curves.items()
        },
        "arrays": {name: list(values.shape) for name, values in result.arrays.items()},
        "converged": result.converged,
        "notes": list(result.notes),
    }

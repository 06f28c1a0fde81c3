"""A probe's numbers against the epoch: as the JSON that is stored, as a result, as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lsa.figures.trajectory import LIMITS, SHARPNESS
from lsa.probe import Curve, Metric, Probe, Result
from lsa.project import TRAJECTORY, Recipe
from lsa.runtime.documents import json_number
from lsa.tracking import registered
from lsa.training import stability


def content(
    declared: Probe, recipe: Recipe, kept: Sequence[tuple[int, str]], results: Sequence[Result]
) -> dict[str, Any]:
    """A trajectory as JSON values, with "nan" where an epoch lacks a number.

    Args:
        declared: The probe.
        recipe: Of the training.
        kept: Epoch and model id of each checkpoint.
        results: The probe's result at each of them.
    """
    evaluated = [registered.numbers(model_id) for _, model_id in kept]
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    limit, notes = threshold(recipe, names)
    shared = [note for note in results[0].notes if all(note in r.notes for r in results)]
    for (epoch, _), result in zip(kept, results, strict=True):
        notes += [f"epoch {epoch}: {note}" for note in result.notes if note not in shared]
    return {
        "probe": declared.name,
        "epochs": [epoch for epoch, _ in kept],
        "train_loss": _column(numbers.get("final/train_loss") for numbers in evaluated),
        "val_accuracy": _column(numbers.get("final/val_accuracy") for numbers in evaluated),
        "metrics": {name: _metric([r.metrics.get(name) for r in results]) for name in names},
        "converged": [result.converged for result in results],
        "threshold": limit,
        "notes": [*shared, *notes],
    }


def _metric(column: Sequence[Metric | None]) -> dict[str, Any]:
    """One number at every epoch."""
    known = [metric for metric in column if metric]
    sources = dict.fromkeys(source for metric in known for source in metric.errors)
    return {
        "unit": known[0].unit,
        "value": _column(metric and metric.value for metric in column),
        "standard_errors": {
            source: _column(metric and metric.errors.get(source) for metric in column)
            for source in sources
        },
    }


def _column(values: Iterable[float | None]) -> list[float | str]:
    return [json_number(np.nan if value is None else value) for value in values]


def threshold(recipe: Recipe, names: Sequence[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """λ_max at which the optimizer would diverge on a quadratic, in units of the loss.

    Args:
        recipe: Of the training.
        names: Metrics of the trajectory; without a λ_max among them there is no threshold.

    Returns:
        Value and formula, or None; and a note that says why there is none.
    """
    if not any(name in names for name in SHARPNESS):
        return None, []
    schedule = recipe.train.schedule
    if schedule.name != "constant" or schedule.options.get("warmup_epochs"):
        return None, ["no stability threshold: the learning rate changes during training"]
    limit = stability.stability_threshold(recipe.rule.name, recipe.rule.options)
    if limit is None:
        return None, [
            f"no stability threshold of raw λ_max for {recipe.rule.name} with these options: an "
            "adaptive method's holds for the preconditioned Hessian"
        ]
    return {"value": limit[0], "formula": limit[1]}, []


def result(stored: Mapping[str, Any], run_id: str) -> Result:
    """A stored trajectory as a result: each number at the last epoch, and its curve."""
    curves = {name: _curve(stored, name) for name in stored["metrics"]}
    metrics = {
        name: Metric(
            float(column["value"][-1]),
            column["unit"],
            {source: float(e[-1]) for source, e in column["standard_errors"].items()},
        )
        for name, column in stored["metrics"].items()
    }
    return Result(
        metrics,
        curves,
        converged=all(stored["converged"]),
        notes=tuple(stored["notes"]),
        probe=TRAJECTORY + stored["probe"],
        run_id=run_id,
    )


def drawn(declared: Probe, stored: Mapping[str, Any]) -> Result:
    """The part of a trajectory that its figure shows: three numbers, with thresholds."""
    shown = [name for name in (*LIMITS, *declared.headline) if name in stored["metrics"]]
    shown = (shown or list(stored["metrics"]))[:3]
    shown += [LIMITS[name] for name in shown if LIMITS.get(name) in stored["metrics"]]
    threshold = stored["threshold"]
    lines = {threshold["formula"]: Metric(threshold["value"], "loss")} if threshold else {}
    return Result(lines, {name: _curve(stored, name) for name in shown})


def _curve(stored: Mapping[str, Any], name: str) -> Curve:
    """One number against the epoch; its errors of several sources added in squares."""
    column = stored["metrics"][name]
    variances = [_numbers(e) ** 2 for e in column["standard_errors"].values()]
    error = np.sqrt(sum(variances[1:], variances[0])) if variances else None
    epochs = np.array(stored["epochs"], float)
    return Curve(epochs, _numbers(column["value"]), "epoch", error, y_unit=column["unit"])


def _numbers(column: Sequence[float | str]) -> np.ndarray:
    return np.array([float(value) for value in column])

"""JSON artifacts of runs, read back: curves of probes, and trajectories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import pydantic

from lsa.project import first_rule
from lsa.reports.measurements import Measurement
from lsa.runtime.errors import InputError
from lsa.tracking import runs, store
from lsa.tracking.runs import Done

Shape = TypeVar("Shape", bound=pydantic.BaseModel)


@dataclass(frozen=True)
class Trajectory:
    """A probe along one training run: `trajectory.json` of a step `trajectory.<probe>`."""

    probe: str
    subject: str
    seed: int
    epochs: list[float]
    train_loss: list[float]
    metrics: Mapping[str, list[float]]  # one value per epoch
    threshold: float = math.nan  # λ_max above which training is unstable, where there is one
    formula: str = ""  # of the threshold
    errors: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)  # by source
    accuracy: Sequence[float] = ()  # on the validation split, where there is one


# Text that a figure takes as it is: between two $ it would be a formula.
_Text = Annotated[str, pydantic.Field(pattern=r"^[^$]*$", max_length=200)]


class StoredCurve(pydantic.BaseModel):
    """A curve in a probe's JSON artifact, as far as figures need it."""

    x_name: _Text
    x: list[float]
    y: list[float]
    y_standard_error: list[float] | None = None

    @pydantic.model_validator(mode="after")
    def _paired(self) -> StoredCurve:
        if any(len(column) != len(self.x) for column in (self.y, self.y_standard_error or self.x)):
            raise ValueError("of as many x as y")
        return self


class StoredResult(pydantic.BaseModel):
    """A probe's JSON artifact."""

    curves: dict[_Text, StoredCurve]


class _Series(pydantic.BaseModel):
    value: list[float]
    standard_errors: dict[_Text, list[float]] = {}


class _Threshold(pydantic.BaseModel):
    value: float = math.nan
    formula: _Text = ""


class _StoredTrajectory(pydantic.BaseModel):
    epochs: list[float]
    train_loss: list[float]
    val_accuracy: list[float] = []
    metrics: dict[_Text, _Series]
    threshold: _Threshold | None = None

    @pydantic.model_validator(mode="after")
    def _paired(self) -> _StoredTrajectory:
        columns = self.metrics.values()
        errors = (error for column in columns for error in column.standard_errors.values())
        series = [self.train_loss, self.val_accuracy or self.train_loss]
        series += [*(column.value for column in columns), *errors]
        if any(len(column) != len(self.epochs) for column in series):
            raise ValueError("of one value per epoch")
        return self


def read_trajectories(measurements: Sequence[Measurement]) -> list[Trajectory]:
    """Every trajectory that the project has measured."""
    steps = [m for m in measurements if m.step.startswith("trajectory.")]
    contents = artifacts([(m.done, "trajectory.json") for m in steps], _StoredTrajectory)
    return [_trajectory(m, stored) for m, stored in zip(steps, contents, strict=True)]


def _trajectory(m: Measurement, stored: _StoredTrajectory) -> Trajectory:
    threshold = stored.threshold or _Threshold()
    return Trajectory(
        probe=m.step.partition(".")[2],
        subject=m.subject,
        seed=m.seed,
        epochs=stored.epochs,
        train_loss=stored.train_loss,
        metrics={name: series.value for name, series in stored.metrics.items()},
        threshold=threshold.value,
        formula=threshold.formula,
        errors={name: series.standard_errors for name, series in stored.metrics.items()},
        accuracy=stored.val_accuracy,
    )


def artifacts(wanted: Sequence[tuple[Done, str]], shape: type[Shape]) -> list[Shape]:
    """JSON artifacts by run and path, fetched several at a time: a server answers each slowly.

    Raises:
        InputError: One is missing, or none that lsa wrote.
    """

    def read(done: Done, path: str) -> Shape:
        try:
            return shape.model_validate(runs.artifact(done.run_id, path, done.artifacts))
        except pydantic.ValidationError as error:
            rule = first_rule(error)
            raise InputError(
                f"artifact {path} of run {done.run_id} is none that lsa wrote ({rule}); delete the "
                "run and repeat its step"
            ) from None

    with ThreadPoolExecutor(store.AT_ONCE) as pool:
        return list(pool.map(lambda address: read(*address), wanted))

"""What every way of measuring returns: metrics with their errors, curves, arrays, notes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from lsa.runtime.documents import json_number
from lsa.runtime.errors import InputError

if TYPE_CHECKING:  # what the command line's help does not wait for
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Metric:
    """One measured number, with its unit and a standard error per source of error.

    Sources: `data` (which samples), `probes` (random probe vectors), `subspaces`, …; they are
    different things, so they are kept and logged apart.
    """

    value: float
    unit: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)


def standard_error(values: Any, source: str = "data") -> dict[str, float]:
    """Standard error of the mean of a tensor `(n,)`, as a metric's errors; none of a single value.

    For a number that is no mean, `values` are its influences: what each sample adds to it, to first
    order (Hampel 1974).
    """
    n = len(values)
    return {source: (values.double().std() / n**0.5).item()} if n > 1 else {}


def with_ends(values: Mapping[str, float]) -> Iterator[tuple[str, tuple[float, float] | None]]:
    """Names to print, each with the ends of its 95 % interval where it has one.

    Numbers `x_low` and `x_high` are the ends of x, and stand beside it; without `x_high` it has no
    upper end.
    """
    intervals = {
        name: (values[f"{name}_low"], values.get(f"{name}_high", math.inf))
        for name in values
        if f"{name}_low" in values
    }
    beside = {f"{name}_{end}" for name in intervals for end in ("low", "high")}
    for name in values:
        if name not in beside:
            yield name, intervals.get(name)


@dataclass(frozen=True, eq=False)
class Curve:
    """y against x on a grid that is the same for every checkpoint, so that curves overlay."""

    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,)
    x_name: str = "x"
    error: np.ndarray | None = None  # (n,) standard error of y
    x_unit: str = ""
    y_unit: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Curve):
            return NotImplemented
        return _curve_to_dict(self) == _curve_to_dict(other)

    __hash__ = None  # type: ignore[assignment]  # it holds arrays, as a list holds items


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a measurement; of a tracked step, with the run that holds it.

    `result["lambda_max"]` is a metric. Two results are equal when they hold the same numbers.
    """

    metrics: Mapping[str, Metric]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)  # "file.name" share file.npz
    converged: bool = True
    notes: tuple[str, ...] = ()  # one plain sentence each; what a reader must know
    probe: str = ""  # the probe, `train`, or `trajectory.<probe>`
    run_id: str = ""  # MLflow run; empty for an untracked measurement
    checkpoint: str = ""  # address of the checkpoint that a training registered
    reused: bool = False  # read back from an earlier run of the same step

    def __getitem__(self, name: str) -> Metric:
        """The metric of that name.

        Raises:
            KeyError: There is none; the message lists those that there are.
        """
        if name not in self.metrics:
            near = get_close_matches(name, self.metrics, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise KeyError(f"no metric {name!r}; {hint}known: {', '.join(self.metrics)}")
        return self.metrics[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a metric of that name."""
        return name in self.metrics

    def __eq__(self, other: object) -> bool:
        import numpy as np

        if not isinstance(other, Result):
            return NotImplemented
        same_arrays = self.arrays.keys() == other.arrays.keys() and all(
            np.array_equal(values, other.arrays[name], equal_nan=values.dtype.kind in "fc")
            for name, values in self.arrays.items()
        )
        return same_arrays and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it holds arrays, as a list holds items

    def to_dict(self) -> dict[str, Any]:
        """All but the arrays, as JSON has it; NaN and infinity are words."""
        return {
            "probe": self.probe,
            "run_id": self.run_id,
            "checkpoint": self.checkpoint,
            "metrics": {
                name: {
                    "value": json_number(m.value),
                    "unit": m.unit,
                    "standard_errors": {source: json_number(e) for source, e in m.errors.items()},
                }
                for name, m in self.metrics.items()
            },
            "curves": {name: _curve_to_dict(curve) for name, curve in self.curves.items()},
            "arrays": {name: list(values.shape) for name, values in self.arrays.items()},
            "converged": self.converged,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> Result:
        """The inverse of `to_dict`, with the arrays given apart."""
        return cls(
            metrics={
                name: Metric(
                    float(m["value"]),
                    m["unit"],
                    {source: float(e) for source, e in m["standard_errors"].items()},
                )
                for name, m in content["metrics"].items()
            },
            curves={name: _curve_from_dict(c) for name, c in content["curves"].items()},
            arrays=arrays or {},
            converged=bool(content["converged"]),
            notes=tuple(content["notes"]),
            probe=content.get("probe", ""),
            run_id=content.get("run_id", ""),
            checkpoint=content.get("checkpoint", ""),
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per metric: value, unit, and a column `se_<source>` per source of error."""
        import pandas as pd

        rows = {
            name: {"value": m.value, "unit": m.unit, **{f"se_{s}": e for s, e in m.errors.items()}}
            for name, m in self.metrics.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything into one `.npz` file, which `Result.load` reads."""
        import numpy as np

        arrays: dict[str, Any] = {f"array/{k}": values for k, values in self.arrays.items()}
        with open(path, "wb") as file:
            np.savez(file, result=np.array(json.dumps(self.to_dict())), **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Result:
        """Read what `save` wrote.

        Raises:
            InputError: The file is not there, or `save` did not write it.
        """
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as stored:
                content = json.loads(str(stored["result"]))
                arrays = {
                    name.removeprefix("array/"): stored[name]
                    for name in stored.files
                    if name.startswith("array/")
                }
            return cls.from_dict(content, arrays)
        except (OSError, EOFError, BadZipFile, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} holds no result ({error}); give a file that Result.save wrote"
            ) from None

    def __str__(self) -> str:
        """The probe, whether it converged, its metrics with standard errors, and its notes."""
        numbers = {name: metric.value for name, metric in self.metrics.items()}
        rows = [
            (name, f"{m.value:.6g} {m.unit}".rstrip(), beside(m, ends))
            for name, ends in with_ends(numbers)
            if (m := self.metrics[name])
        ]
        wide, long = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        return "\n".join(
            [
                f"{self.probe or 'result'}: {'converged' if self.converged else 'not converged'}",
                *(f"{a:<{wide}}  {b:<{long}}  {c}".rstrip() for a, b, c in rows),
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def _repr_html_(self) -> str | None:
        return _render(self)


def beside(metric: Metric, ends: tuple[float, float] | None) -> str:
    """A number's standard errors in words, or the ends of its interval."""
    if ends:
        high = f"to {ends[1]:.4g}" if math.isfinite(ends[1]) else "upwards"
        return f"95 % interval {ends[0]:.4g} {high}"
    if not metric.errors:
        return ""
    each = ", ".join(f"{error:.2g} ({source})" for source, error in metric.errors.items())
    return f"standard error {each}"


def _curve_to_dict(curve: Curve) -> dict[str, Any]:
    x, y, error = (
        None if values is None else [json_number(value) for value in values]
        for values in (curve.x, curve.y, curve.error)
    )
    return {
        "x_name": curve.x_name,
        "x_unit": curve.x_unit,
        "y_unit": curve.y_unit,
        "x": x,
        "y": y,
        "y_standard_error": error,
    }


def _curve_from_dict(content: Mapping[str, Any]) -> Curve:
    import numpy as np

    x, y, error = (
        None if values is None else np.array([float(value) for value in values])
        for values in (content["x"], content["y"], content["y_standard_error"])
    )
    assert x is not None and y is not None
    return Curve(x, y, content["x_name"], error, content["x_unit"], content["y_unit"])


def _no_page(result: Result) -> str | None:
    """Notebooks then show the plain text."""


_render: Callable[[Result], str | None] = _no_page


def show_with(render: Callable[[Result], str]) -> None:
    """Set the renderer for notebooks. The figures lie above this module, so they register it."""
    global _render
    _render = render

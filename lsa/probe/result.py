"""What a probe returns: metrics with their errors, curves, arrays, notes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the command line's help does not wait for
    import numpy as np


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


@dataclass(frozen=True)
class Curve:
    """y against x on a grid that is the same for every checkpoint, so that curves overlay."""

    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,)
    x_name: str = "x"
    error: np.ndarray | None = None  # (n,) standard error of y
    x_unit: str = ""
    y_unit: str = ""


@dataclass(frozen=True)
class Result:
    """What a probe measured. Figures are drawn from it, never inside a probe."""

    metrics: Mapping[str, Metric]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)  # "file.name" share file.npz
    converged: bool = True
    notes: tuple[str, ...] = ()  # one plain sentence each; what a reader must know
    probe: str = ""  # which one measured it, where it was called by its declaration

    def _repr_html_(self) -> str:
        """HTML for a notebook, by `lsa.figures.notebook`."""
        return importlib.import_module("lsa.figures.notebook").html(self)

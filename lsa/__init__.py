"""Loss-landscape analysis of optimizers, tracked with MLflow.

Each probe is a function here: `lsa.lanczos(landscape, k=3)` returns a `Result`.
Names are imported on first use, so that `import lsa` and `lsa --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lsa.probe import registry
from lsa.probe.result import show_with

if TYPE_CHECKING:
    from lsa import watching
    from lsa.landscape import Landscape, objectives
    from lsa.landscape.derivatives.budget import configure
    from lsa.landscape.terms import Terms
    from lsa.probe import Curve, Metric, Result
    from lsa.runtime.errors import InputError
    from lsa.studies.adoption import adopt, register
    from lsa.studies.load import load
    from lsa.studies.measure import measure
    from lsa.studies.study import step, study
    from lsa.studies.trajectory import measure_trajectory
    from lsa.tracking.checkpoint import Checkpoint
    from lsa.training.preconditioners import Rule, preconditioner
    from lsa.watching.watch import watch

_HOMES = {
    "Checkpoint": "lsa.tracking.checkpoint",
    "Curve": "lsa.probe",
    "InputError": "lsa.runtime.errors",
    "Landscape": "lsa.landscape",
    "Metric": "lsa.probe",
    "Result": "lsa.probe",
    "Rule": "lsa.training.preconditioners",
    "adopt": "lsa.studies.adoption",
    "Terms": "lsa.landscape.terms",
    "configure": "lsa.landscape.derivatives.budget",
    "measure_trajectory": "lsa.studies.trajectory",
    "load": "lsa.studies.load",
    "measure": "lsa.studies.measure",
    "preconditioner": "lsa.training.preconditioners",
    "register": "lsa.studies.adoption",
    "step": "lsa.studies.study",
    "study": "lsa.studies.study",
    "watch": "lsa.watching.watch",
}

_MODULES = {"objectives": "lsa.landscape.objectives", "watching": "lsa.watching"}

__all__ = [
    "Checkpoint",
    "Curve",
    "InputError",
    "Landscape",
    "Metric",
    "Result",
    "Rule",
    "Terms",
    "adopt",
    "configure",
    "load",
    "measure",
    "measure_trajectory",
    "objectives",
    "preconditioner",
    "register",
    "step",
    "study",
    "watch",
    "watching",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_") and name in registry.modules():
        return registry.find(name)
    raise AttributeError(f"module 'lsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *registry.modules()})


show_with(lambda result: importlib.import_module("lsa.figures.notebook").html(result))

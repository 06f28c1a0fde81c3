"""Loss-landscape analysis of optimizers, tracked with MLflow.

The names below are imported on first use, so that `import lsa` and `lsa --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsa.errors import InputError
    from lsa.landscape import Landscape
    from lsa.memory.checkpoint import Checkpoint
    from lsa.probe import PROBES, Curve, Metric, Result
    from lsa.steps import load, measure
    from lsa.studies import step, study
    from lsa.trajectory import follow

_HOMES = {
    "Checkpoint": "lsa.memory.checkpoint",
    "Curve": "lsa.probe",
    "InputError": "lsa.errors",
    "Landscape": "lsa.landscape",
    "Metric": "lsa.probe",
    "PROBES": "lsa.probe",
    "Result": "lsa.probe",
    "follow": "lsa.trajectory",
    "load": "lsa.steps",
    "measure": "lsa.steps",
    "step": "lsa.studies",
    "study": "lsa.studies",
}

__all__ = [
    "PROBES",
    "Checkpoint",
    "Curve",
    "InputError",
    "Landscape",
    "Metric",
    "Result",
    "follow",
    "load",
    "measure",
    "step",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lsa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""How a probe is declared, what it returns, and where it is found."""

from lsa.probe.declaration import INPUTS, PROBES, Option, Probe, Sizes, Work, probe
from lsa.probe.registry import find, modules
from lsa.probe.result import Curve, Metric, Result, standard_error
from lsa.runtime.progress import Report

__all__ = [
    "INPUTS",
    "PROBES",
    "Curve",
    "Metric",
    "Option",
    "Probe",
    "Report",
    "Result",
    "Sizes",
    "Work",
    "find",
    "modules",
    "probe",
    "standard_error",
]

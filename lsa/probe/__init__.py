"""How a probe is declared, what it returns, and where it is found."""

from lsa.probe.checks import AtMost, Same
from lsa.probe.declaration import INPUTS, PROBES, Option, Probe, probe
from lsa.probe.registry import find, modules
from lsa.probe.result import Curve, Metric, Result, standard_error
from lsa.probe.work import Sizes, Work, lanczos_rows
from lsa.runtime.progress import Report

__all__ = [
    "INPUTS",
    "PROBES",
    "AtMost",
    "Curve",
    "Metric",
    "Option",
    "Probe",
    "Report",
    "Result",
    "Same",
    "Sizes",
    "Work",
    "find",
    "lanczos_rows",
    "modules",
    "probe",
    "standard_error",
]

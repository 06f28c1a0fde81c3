"""How a probe is declared, what it returns, and where it is found."""

from lsa.probe.checks import AtMost, Same
from lsa.probe.declaration import INPUTS, PROBES, Option, Probe, probe
from lsa.probe.registry import find, modules
from lsa.probe.result import Curve, Metric, Result, standard_error
from lsa.probe.work import Sizes, Work, between, lanczos_rows, lanczos_vectors
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
    "between",
    "find",
    "lanczos_rows",
    "lanczos_vectors",
    "modules",
    "probe",
    "standard_error",
]

"""The run that `mlflow run` has made for this command, which the command's step continues.

Only the command line takes it: a Python program that `mlflow run` started has a run of its own,
in which lsa's steps are children.
"""

from __future__ import annotations

import os

VARIABLE = "MLFLOW_RUN_ID"
_run_id = ""


def take() -> None:
    """Take the run over from the environment, where MLflow and child processes would find it."""
    global _run_id
    _run_id = os.environ.pop(VARIABLE, "")


def run_id() -> str:
    """The run ID; empty where `mlflow run` made no run, or a step has taken it."""
    return _run_id


def use() -> str:
    """The run ID, handed to the first step; further steps make runs of their own."""
    global _run_id
    run_id, _run_id = _run_id, ""
    return run_id

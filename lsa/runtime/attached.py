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
    """Its ID; empty where there is none, or a step has it."""
    return _run_id


def use() -> str:
    """Its ID, for the step that continues it: what that step calls is another run."""
    global _run_id
    run_id, _run_id = _run_id, ""
    return run_id

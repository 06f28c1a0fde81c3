"""What MLflow's variables say of the run and experiment that a process belongs to.

`mlflow run` makes a run for its command, which the command's first step continues. Only the command
line takes it: a Python program that `mlflow run` started has a run of its own, in which lsa's steps
are children.
"""

from __future__ import annotations

import os

RUN_ID, EXPERIMENT_ID = "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"
EXPERIMENT_NAME = "MLFLOW_EXPERIMENT_NAME"
_run_id = ""


def take() -> None:
    """Take the run over from the environment, where MLflow and child processes would find it."""
    global _run_id
    _run_id = os.environ.pop(RUN_ID, "")


def run_id() -> str:
    """The run ID; empty where `mlflow run` made no run, or a step has taken it."""
    return _run_id


def use() -> str:
    """The run ID, handed to the first step; further steps make runs of their own."""
    global _run_id
    run_id, _run_id = _run_id, ""
    return run_id


def enclosing() -> str:
    """The run of the program that `mlflow run` started; empty where there is none."""
    return os.environ.get(RUN_ID, "")


def forget() -> None:
    """Leave the run out of a worker's environment: it is the study's."""
    os.environ.pop(RUN_ID, None)


def experiment_id() -> str:
    """The experiment that the user chose by its ID; empty where none is chosen."""
    return os.environ.get(EXPERIMENT_ID, "")


def experiment_name(usual: str) -> str:
    """The experiment that the user chose by its name, else the usual one."""
    return os.environ.get(EXPERIMENT_NAME, usual)

"""Makes `mlflow run` of lsa work without conda, and end its run when it is stopped.

MLflow imports this module whenever it is imported itself (an `mlflow.run_context_provider`). It
acts only in a `mlflow run` of this project. Without conda, `conda_env: conda.yaml` would fail and
leave the run RUNNING for ever, so a stand-in that uses the current Python answers in conda's place.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STAND_IN = Path(__file__).parent / "_conda"
SWITCH = "LSA_CONDA_STANDIN"


class LsaContext:
    """MLflow run context provider: the true environment of a run that the stand-in served."""

    def in_context(self) -> bool:
        """Whether the stand-in answers for conda in this process."""
        return os.environ.get("MLFLOW_CONDA_HOME") == str(STAND_IN)

    def tags(self) -> dict[str, str]:
        """What MLflow's own tag (`conda`) hides."""
        return {"lsa.environment": f"current Python {sys.executable}; conda is not installed"}


def project_of(arguments: Sequence[str]) -> str | None:
    """The project's address in an `mlflow run` command line, or None for any other command."""
    program, rest = Path(arguments[0]).name if arguments else "", list(arguments[1:])
    if program not in ("mlflow", "__main__.py", "mlflow.exe") or rest[:1] != ["run"]:
        return None
    takes_value = re.compile(r"-[evPAbckr]|--(?!no-|help|build|skip|quiet)[a-z-]+")
    words = iter(rest[1:])
    for word in words:
        if takes_value.fullmatch(word):
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def is_lsa(address: str) -> bool:
    """Whether the project is lsa. One that is not a local folder is recognised by its address."""
    project = Path(address) / "MLproject"
    if project.is_file():
        return re.search(r"^name: *lsa *$", project.read_text(), re.MULTILINE) is not None
    return re.search(r"(^|/)lsa(\.git)?(#.*)?$", address) is not None


def needs_stand_in(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether conda would be asked for and is not there."""
    chosen = any(a.startswith("--env-manager") for a in arguments)
    has_conda = shutil.which("conda", path=environment.get("PATH")) is not None
    known = {"MLFLOW_CONDA_HOME", "CONDA_EXE"} & environment.keys()
    return not (chosen or has_conda or known or environment.get(SWITCH) == "off")


def _stop(*_: Any) -> None:
    """On SIGTERM do what MLflow does on Ctrl-C: stop the child and wait for it."""
    raise KeyboardInterrupt


def _set_up() -> None:
    address = project_of(sys.argv)
    if address is None or not is_lsa(address):
        return
    signal.signal(signal.SIGTERM, _stop)
    if needs_stand_in(sys.argv, os.environ):
        os.environ["MLFLOW_CONDA_HOME"] = str(STAND_IN)


_set_up()

"""The handle of a study's step: its state, and its result once it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from lsa.probe import Metric, Result
from lsa.runtime.errors import InputError
from lsa.studies.calls import Call
from lsa.tracking import results, runs

# "queued": an engine that waits for a step's inputs by itself has it.
State = Literal["waiting", "queued", "running", "done", "reused", "unlogged", "failed", "skipped"]
ENDS: tuple[State, ...] = ("done", "reused", "unlogged", "failed", "skipped")
LOST: dict[State, str] = {"unlogged": "is not logged", "failed": "failed", "skipped": "failed"}


@dataclass(eq=False)
class Handle:
    """A step of a study. Asking for its result waits until the step has ended."""

    call: Call
    needs: tuple[Handle, ...]
    run: Callable[[Handle], None] | None  # runs the study until this step ends; None elsewhere
    state: State = "waiting"
    tries: int = 0
    error: str = ""
    future: Future | None = None  # since it was submitted
    _result: Result | None = None

    @property
    def finished(self) -> bool:
        """Whether the step has ended."""
        return self.state in ENDS

    @property
    def result(self) -> Result:
        """The step's result; its arrays stay in the artifacts of its run.

        Raises:
            InputError: It has failed, or a step that it needs has.
        """
        if self.run is not None:
            self.run(self)
        if self._result is None:
            raise InputError(f"{self.call.label}: {self.error}")
        return self._result

    def __getitem__(self, name: str) -> Metric:
        """A number of its result, `handle["lambda_max"]`."""
        return self.result[name]

    def __getstate__(self) -> dict[str, Any]:
        """The finished step for another process, which does not get the study."""
        if self.run is not None:
            self.run(self)
        return {**self.__dict__, "run": None, "future": None}

    @property
    def command(self) -> str:
        """The command that repeats the step."""
        overridden = any(need.call.options for need in self.needs)
        return self.call.command([need.run_id for need in self.needs] if overridden else ())

    @property
    def run_id(self) -> str:
        """ID of the step's run."""
        return self.result.run_id

    @property
    def stored_in(self) -> str:
        """ID of the run that holds the result; empty while there is none."""
        return self._result.run_id if self._result else ""

    def _repr_html_(self) -> str | None:
        if not (self.finished and self._result):
            return None
        shown = self._result
        with contextlib.suppress(InputError, runs.Broken):
            shown = results.read(shown.run_id)  # with the arrays that its figure is drawn from
        return shown._repr_html_()

    def __repr__(self) -> str:
        return f"<{self.call.label}: {self.state}{self.error and f' ({self.error})'}>"

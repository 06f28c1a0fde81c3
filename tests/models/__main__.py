"""Print one verdict for each case of the table; fail where one does not hold.

`python -m tests.models` runs the tests that hold the cases. What needs a library that is not
installed is `not tried`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]  # as pytest has it

from models.table import CASES, Case  # noqa: E402


class Outcomes:
    """What became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the worst of setup, call and teardown."""
        if report.outcome != "passed" or report.nodeid not in self.of:
            self.of[report.nodeid] = report.outcome


def verdict(case: Case, outcomes: dict[str, str]) -> str:
    """What the tests of a case say together."""
    found = [outcome for test in case.tests for outcome in matching(test, outcomes)]
    if not found or "failed" in found:
        return "DOES NOT HOLD"
    return case.verdict if "passed" in found else "not tried"


def matching(test: str, outcomes: dict[str, str]) -> list[str]:
    """Outcomes of a test, in all its parameters or those that begin so."""
    return [outcome for name, outcome in outcomes.items() if name.startswith(test)]


def main() -> int:
    """Run the tests and print the table."""
    files = sorted({test.split("::")[0] for case in CASES for test in case.tests})
    names = sorted({test.split("::")[1].split("[")[0] for case in CASES for test in case.tests})
    outcomes = Outcomes()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", " or ".join(names)]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "0"]
    pytest.main([*(str(ROOT / file) for file in files), *options], plugins=[outcomes])
    verdicts = [verdict(case, outcomes.of) for case in CASES]
    width = max(len(case.what) for case in CASES)
    for case, said in zip(CASES, verdicts, strict=True):
        print(f"{case.what:{width}}  {said}")
    return int("DOES NOT HOLD" in verdicts)


if __name__ == "__main__":
    sys.exit(main())

"""Print how often errors and intervals hold, by the simulations that test it; fail where not.

`python -m tests.simulations [words]` runs the tests that record a coverage; with words, those whose
name has one of them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = (
    "probes/test_coverage.py::test_two_standard_errors_cover_the_populations_number",
    "probes/test_lanczos.py::test_the_bias_of_few_samples_is_what_the_halves_say",
    "probes/test_interpolation.py::test_two_errors_of_a_barrier_cover_it_in_90_percent",
    "maths/spectra/test_quadrature.py::test_the_errors_of_three_probes_cover",
    "maths/spectra/test_quadrature.py::test_two_errors_of_the_effective_rank_cover_it",
    "maths/spectra/test_quadrature.py::test_two_errors_of_what_the_density_says_cover_it",
    "maths/spectra/test_moments.py::test_intervals_cover_the_truth",
    "maths/spectra/test_detection.py::test_it_holds_as_often_as_it_says",
    "maths/test_ratios.py::test_the_interval_of_a_noise_scale_covers_it",
    "maths/test_crossing.py::test_interval_covers_the_truth",
    "watching/test_own_noise.py::test_estimates_are_unbiased_and_the_interval_covers",
    "reports/statistics/test_comparison.py::test_the_interval_covers_the_true_ratio",
)


class Recorded:
    """The coverages that tests have recorded, and the tests that failed."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep what a call has recorded."""
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "coverage"]


def main(words: Sequence[str]) -> int:
    """Run the simulations and print a table of Markdown."""
    tests = [test for test in TESTS if not words or any(word in test for word in words)]
    if not tests:
        print(f"no simulation has {' or '.join(words)} in its name; known: {', '.join(TESTS)}")
        return 1
    files = sorted({test.split("::")[0] for test in tests})
    names = " or ".join(sorted({test.split("::")[1] for test in tests}))
    recorded = Recorded()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", names]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "0"]
    paths = [str(ROOT / "tests" / file) for file in files]
    pytest.main([*paths, *options], plugins=[recorded])
    print("| number | error over | promised | found | runs |")
    print("|---|---|---|---|---|")
    for number, error, promised, share, runs in recorded.rows:
        print(f"| {number} | {error} | {promised} | {share:.1%} | {runs} |")
    print(*recorded.failed, sep="\n")
    return int(bool(recorded.failed) or not recorded.rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Faults that tests of the suite inject: each row is a selection of them, run by pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from faults import Row

ROOT = Path(__file__).parents[2]
REFUSED = "nothing of other logins; every attempt is refused"
# Files of tests, and which tests of them → fault, how it is injected, what is lost, what is seen.
SHOWN: dict[tuple[str, str], tuple[str, str, str, str]] = {
    ("tests/test_hostile_store.py", ""): (
        "somebody else's runs and checkpoints in the store",
        "tags, times, parameters and artifacts that lsa never writes: seeds of thousands of "
        "digits, years beyond 9999, JSON nested 99 deep, control characters",
        "nothing: every command about the project succeeds",
        "the run with its control characters escaped",
    ),
    ("tests/tracking/test_sync.py tests/studies/test_steps.py", "stranger or altered"): (
        "somebody else's finished run with the key of our step",
        "before our step, while it measures, and while its result waits in the spool; without a "
        "result, with a damaged one, and with another",
        "nothing: the other run does not count; our step is measured and logged",
        "one line that names the run",
    ),
    ("tests/test_security.py", ""): (
        "artifacts and results that would harm their reader",
        "names that lead out of their folder, markup for the report, pickles in place of data",
        "nothing: no file outside the folder is written, and none of their code runs",
        "one line, or the text as text",
    ),
    ("tests/tracking/test_spool.py tests/tracking/test_sync.py", "another_store or one_store"): (
        "two stores used from one folder",
        "a step measured while store A is away, then the same step for store B",
        "nothing: the result for A is delivered to A, and B has its own run",
        "`lsa sync` for B says: “stays: it is for the store …”",
    ),
    ("tests/tracking/test_guard.py", "not other_users and not machine"): (
        "an attacker on `lsa server --auth`, with a login or without",
        "requests in 2 to 4 spellings each: overwrite or delete other logins' artifacts, runs and "
        "models, delete all artifacts at once, read files of the server's disk as a model, use "
        "another host's name",
        REFUSED,
        "403; a command of lsa says so in one line",
    ),
    ("tests/tracking/test_guard.py tests/tracking/test_server.py", "other_users or secret"): (
        "another user of the server's machine",
        "modes of every file that the server keeps, its list of processes, its environment",
        "nothing: other users can read none of the files, and no password is in the list of "
        "processes",
        "nothing",
    ),
    ("tests/cli/test_streams.py", ""): (
        "output that cannot be written",
        "a terminal in ASCII or cp1252, closed streams (`2>&-`), a reader that stops (`| head`), "
        "/dev/full",
        "nothing: what was measured is logged, the run is FINISHED",
        "escapes for characters that the terminal lacks (`\\u03bb`); exit code 1 on a full disk, "
        "and that of SIGPIPE without a reader",
    ),
}


def rows(folder: Path) -> list[Row]:
    """The faults of this module; `folder` is for others."""
    return [
        Row(fault, injected, passed(files.split(), which), lost, seen)
        for (files, which), (fault, injected, lost, seen) in SHOWN.items()
    ]


def passed(files: list[str], which: str) -> int:
    """Run tests, all of which must pass; their number."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", which]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "skipped" not in done.stdout.splitlines()[-1], done.stdout
    (number,) = re.findall(r"(\d+) passed", done.stdout)
    return int(number)

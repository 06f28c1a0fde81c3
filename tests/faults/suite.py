"""Faults that tests of the suite inject: each row is a selection of them, run by pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from faults import Row

ROOT = Path(__file__).parents[2]
REFUSED = "nothing that is not theirs; every attempt is refused"
# Files of tests, and which tests of them → fault, how it is injected, what is lost, what is seen.
SHOWN: dict[tuple[str, str], tuple[str, str, str, str]] = {
    ("tests/test_hostile_store.py", ""): (
        "somebody else's runs and checkpoints in the store",
        "tags, times, parameters and artifacts that lsa never writes: seeds of thousands of "
        "digits, years beyond 9999, JSON nested 99 deep, control characters",
        "nothing: every command about the project ends well",
        "the run as it is, control characters written out",
    ),
    ("tests/tracking/test_sync.py tests/studies/test_steps.py", "stranger or altered"): (
        "somebody else's finished run with the key of our step",
        "before our step, while it measures and while its result waits in the spool; with no, a "
        "damaged or another result",
        "nothing: it does not count; ours is measured, kept and logged",
        "one line that names the run",
    ),
    ("tests/test_security.py", ""): (
        "artifacts and results made to harm the reader",
        "names that lead out of their folder, markup for the report, pickles in place of data",
        "nothing: no file outside the folder is written, no code of theirs runs",
        "one line, or the text as text",
    ),
    ("tests/tracking/test_spool.py tests/tracking/test_sync.py", "another_store or one_store"): (
        "two stores used from one folder",
        "a step measured while store A is away, then the same step for store B",
        "nothing: what waits for A is delivered to A, B has its own run",
        "of `lsa sync` for B: “stays: it is for the store …”",
    ),
    ("tests/tracking/test_guard.py", "not other_users and not machine"): (
        "an attacker with a login of his own on `lsa server --auth`, or with none",
        "requests as he may write them, in 2 to 4 spellings each: other logins' artifacts, runs "
        "and models overwritten or deleted, all artifacts deleted at once, files of the server's "
        "disk read as a model, another host's name",
        REFUSED,
        "403; a command of lsa says so in one line",
    ),
    ("tests/tracking/test_guard.py tests/tracking/test_server.py", "other_users or secret"): (
        "another user of the server's machine",
        "modes of every file that the server keeps, its list of processes, its environment",
        "nothing: no file is for others, no password stands in the list of processes",
        "nothing",
    ),
    ("tests/cli/test_streams.py", ""): (
        "output that cannot be written",
        "a terminal in ASCII or cp1252, closed streams (`2>&-`), a reader that stops (`| head`), "
        "/dev/full",
        "nothing: what was measured is logged, the run is FINISHED",
        "characters that the terminal lacks written out (`\\u03bb`); exit code 1 where the disk "
        "is full, as of SIGPIPE where nobody reads",
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

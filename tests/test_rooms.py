"""CI adds to `make test` the rooms that a change touches, and all where it cannot tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / ".ci"
AGO = {"GIT_AUTHOR_DATE": "2020-01-01T00:00:00", "GIT_COMMITTER_DATE": "2020-01-01T00:00:00"}


@pytest.fixture
def chosen(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """The rooms of a clone of main whose commits of the last day touch these files."""
    monkeypatch.delenv("LSA_CI_BASE", raising=False)  # of the change that is being tested

    def git(*words: str, **env: str) -> None:
        name = ["-c", "user.name=x", "-c", "user.email=x"]
        command = ["git", *name, *words]
        subprocess.run(command, cwd=tmp_path, env=os.environ | env, check=True, capture_output=True)

    def choose(*files: str, known: bool = True) -> list[str]:
        git("init", "--quiet")
        (tmp_path / ".ci").mkdir()
        for script in ("changes", "rooms"):
            shutil.copy(CI / script, tmp_path / ".ci")
        tests = ["tests/maths/test_sums.py", "tests/studies/test_kill.py", "tests/test_faults.py"]
        for file in tests:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("" if "maths" in file else "@pytest.mark.full\n")
        git("add", ".")
        git("commit", "--quiet", "--message", "old", **(AGO if known else {}))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("changed")
        git("add", ".")
        git("commit", "--quiet", "--allow-empty", "--message", "new")
        said = subprocess.run(
            [".ci/rooms"], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return sorted(said.stdout.split())

    return choose


@pytest.mark.parametrize(
    ("files", "rooms"),
    [
        ([], []),
        (["README.md", "docs/page.md"], []),
        (["lsa/maths/sums.py"], []),  # `make test` has run all that it has
        (["lsa/studies/plan.py"], ["tests/studies", "tests/test_faults.py"]),
        (["lsa/maths/sums.py", "lsa/tracking/store.py"], ["tests/studies", "tests/test_faults.py"]),
        (["lsa/maths/sums.py", "tests/conftest.py"], ["tests"]),
        (["pyproject.toml"], ["tests"]),
    ],
)
def test_a_change_chooses_the_rooms_that_it_touches(chosen, files, rooms):
    assert chosen(*files) == rooms


def test_without_an_older_commit_all_are_chosen(chosen):
    assert chosen("lsa/maths/sums.py", known=False) == ["tests"]

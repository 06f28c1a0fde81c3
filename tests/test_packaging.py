"""What stands twice agrees, and what is shipped is complete."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_conda_and_pyproject_ask_for_the_same():
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert sorted(pip) == sorted(re.findall(r'"([^"]+)"', block[1]))
    assert conda["name"] == "lsa"


def test_the_stand_in_for_conda_is_executable():
    assert os.access(ROOT / "lsa" / "_conda" / "bin" / "conda", os.X_OK)


def test_the_readme_names_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", readme)) <= targets
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(re.findall(r"mlflow run \. -e ([a-z_]+)", readme)) <= set(entries)
    for picture in re.findall(r"\]\((docs/[^)]+)\)", readme):
        assert (ROOT / picture).is_file(), picture


def test_no_tracked_file_is_large():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    large = [f for f in listed if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 1e6]
    assert listed and not large

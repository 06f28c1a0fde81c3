"""What stands twice agrees, and what is shipped is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import hatchling.build
import pytest
import yaml
from servers import environment

ROOT = Path(__file__).parent.parent


def test_conda_and_pyproject_ask_for_the_same():
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert sorted(pip) == sorted(re.findall(r'"([^"]+)"', block[1]))
    assert conda["name"] == "lsa"


def test_other_environment_managers_can_read_conda_yaml():
    from mlflow.utils.environment import _PythonEnv

    read = _PythonEnv.from_conda_yaml(str(ROOT / "conda.yaml"))
    assert re.fullmatch(r"3\.\d+", read.python)  # what `--env-manager uv` asks uv for
    assert "torch>=2.6" in read.dependencies


def test_the_stand_in_for_conda_is_executable():
    assert os.access(ROOT / "lsa" / "tracking" / "conda" / "bin" / "conda", os.X_OK)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as it would be uploaded."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / hatchling.build.build_wheel(str(folder))


def test_a_wheel_holds_the_stand_in_and_the_projects(wheel):
    assert wheel.name.startswith("loss_landscape_analysis-")
    with zipfile.ZipFile(wheel) as packed:
        mode = packed.getinfo("lsa/tracking/conda/bin/conda").external_attr >> 16
        assert mode & 0o111 == 0o111
        names = packed.namelist()
    assert "lsa/tracking/conda/etc/profile.d/conda.sh" in names
    assert "lsa/_projects/digits.yaml" in names


SHORT = ["train", "--optimizer", "sgd", "--epochs", "1"], "models:/digits.sgd/1"
LITERAL = ["study", "digits", "--only", "lanczos"], "6 steps: 6 done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"), [SHORT, pytest.param(*LITERAL, marks=pytest.mark.full)]
)
def test_the_wheel_runs_in_an_empty_folder(wheel, tmp_path, command, said):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)

    def printed(*arguments: str) -> str:
        env = environment(PYTHONPATH=str(installed))
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=empty, env=env, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    assert printed("-c", "import lsa; print(lsa.__file__)").startswith(str(installed))
    assert said in printed("-m", "lsa", *command)
    assert {path.name for path in empty.iterdir()} == {".lsa", "mlflow.db", "mlruns"}


def test_the_readme_names_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", readme)) <= targets
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(re.findall(r"mlflow run \. -e ([a-z_]+)", readme)) <= set(entries)
    steps = set(entries) - {"main", "train"}
    assert set(re.findall(r"\[`([a-z_]+)`\]\(docs/probes/", readme)) == steps
    table = (ROOT / "docs" / "probes" / "index.md").read_text()
    assert set(re.findall(r"^\| \[`([a-z_]+)`\]", table, re.MULTILINE)) == steps


def test_the_readme_is_two_screens_and_names_the_test_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100 and "make test     # in minutes" in "\n".join(lines)


def test_no_tracked_file_is_large():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    large = [f for f in listed if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 1e6]
    assert listed and not large

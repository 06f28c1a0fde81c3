"""The stand-in for conda: when it acts, and for whom."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lsa import mlflow_plugin as plugin

ROOT = Path(__file__).parent.parent
CONDA = plugin.STAND_IN / "bin" / "conda"


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["/x/bin/mlflow", "run", "."], "."),
        (["mlflow", "run", "-e", "lanczos", ".", "-P", "optimizer=sgd"], "."),
        (["mlflow", "run", "--experiment-name", "x", "/a/b"], "/a/b"),
        (["mlflow", "ui"], None),
        (["pytest", "run", "."], None),
    ],
)
def test_the_project_is_read_from_the_command_line(arguments, address):
    assert plugin.project_of(arguments) == address


def test_only_lsa_is_recognised(tmp_path):
    assert plugin.is_lsa(str(ROOT))
    assert plugin.is_lsa("https://example.org/someone/lsa.git#main")
    (tmp_path / "MLproject").write_text("name: other\n")
    assert not plugin.is_lsa(str(tmp_path))
    assert not plugin.is_lsa("https://example.org/someone/other")


def test_the_stand_in_acts_only_without_conda(tmp_path):
    run = ["mlflow", "run", "."]
    empty = {"PATH": str(tmp_path)}
    assert plugin.needs_stand_in(run, empty)
    assert not plugin.needs_stand_in([*run, "--env-manager", "local"], empty)
    assert not plugin.needs_stand_in(run, empty | {"LSA_CONDA_STANDIN": "off"})
    assert not plugin.needs_stand_in(run, empty | {"CONDA_EXE": "/opt/conda/bin/conda"})
    (tmp_path / "conda").write_text("#!/bin/sh\n")
    (tmp_path / "conda").chmod(0o755)
    assert not plugin.needs_stand_in(run, empty)


def test_the_stand_in_serves_lsa_and_refuses_others(tmp_path):
    def create(file: Path) -> subprocess.CompletedProcess:
        command = [str(CONDA), "env", "create", "-n", "x", "--file", str(file), "--quiet"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    ours = create(ROOT / "conda.yaml")
    assert ours.returncode == 0 and "using the current Python" in ours.stderr
    (tmp_path / "conda.yaml").write_text("name: other\n")
    assert create(tmp_path / "conda.yaml").returncode == 127

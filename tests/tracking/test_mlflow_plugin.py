"""The MLflow plugin: for whom it acts, and how a run ends. The slow ones start real processes."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from processes import started

from lsa.runtime import variables
from lsa.tracking import mlflow_plugin as plugin

ROOT = Path(__file__).parents[2]
CONDA = plugin.STAND_IN / "bin" / "conda"
MLFLOW = Path(sys.executable).with_name("mlflow")

WAITS = """
import os, pathlib, signal, time
from mlflow import MlflowClient

def stop(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    MlflowClient().set_terminated(os.environ["MLFLOW_RUN_ID"], "KILLED")
    raise SystemExit(1)

if os.environ["HANDLES"] == "yes":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
pathlib.Path("pid.new").write_text(str(os.getpid()))
pathlib.Path("pid.new").rename("pid")
time.sleep(300)
"""


class Project:
    """A project of that name in a folder, with its own store and an environment without conda."""

    def __init__(self, folder: Path, script: str, name: str = "lsa") -> None:
        command = 'entry_points: {main: {command: "python main.py"}}'
        (folder / "MLproject").write_text(f"name: {name}\nconda_env: conda.yaml\n{command}\n")
        (folder / "conda.yaml").write_text(f"name: {name}\ndependencies: [python=3.11]\n")
        (folder / "main.py").write_text(script)
        self.folder = folder
        self.database = folder / "mlflow.db"
        foreign = ("CONDA_EXE", "MLFLOW_", "LSA_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment = kept | {
            "PATH": f"{MLFLOW.parent}:/usr/bin:/bin",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.database}",
        }

    def run(self, *arguments: str, program: tuple[str, ...] = (str(MLFLOW),), **variables: str):
        return subprocess.run(
            [*program, "run", ".", *arguments],
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def query(self, statement: str) -> list[str]:
        with sqlite3.connect(self.database) as connection:
            return [row[0] for row in connection.execute(statement)]

    def statuses(self) -> list[str]:
        return self.query("select status from runs")

    def recorded_environment(self) -> list[str]:
        return self.query("select value from tags where key = 'lsa.environment'")


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["/x/bin/mlflow", "run", "."], "."),
        (["mlflow", "run", "-e", "lanczos", ".", "-P", "optimizer=sgd"], "."),
        (["mlflow", "run", "-elanczos", "-P", "run=1", "."], "."),
        (["mlflow", "run", "--experiment-name", "x", "/a/b"], "/a/b"),
        (["mlflow", "--env-file", "x.env", "run", "."], "."),
        (["mlflow", "run", "--build-image", "."], "."),
        (["mlflow", "run", ".", "--backend=local"], "."),
        (["mlflow", "run", ".", "-b", "databricks"], None),  # goes on after this process
        (["mlflow", "run"], None),
        (["mlflow", "ui"], None),
        (["mlflow", "models", "serve", "-m", "run"], None),
        (["pytest", "run", "."], None),
        (["/x/lsa/__main__.py", "run", "."], None),
        ([], None),
    ],
)
def test_the_project_is_read_from_the_command_line(arguments, address):
    assert plugin.project_of(arguments) == address


def test_the_program_of_python_m_is_found():
    original = ["/x/python", "-X", "dev", "-m", "mlflow", "run", "."]
    assert plugin.arguments_of(["-m", "run", "."], original) == ["mlflow", "run", "."]
    assert plugin.arguments_of(["-m", "run"], ["python", "-mmlflow", "run"]) == ["mlflow", "run"]
    assert plugin.arguments_of(["/x/mlflow", "run"], original) == ["/x/mlflow", "run"]


def test_only_lsa_is_recognised(tmp_path):
    assert plugin.is_lsa(str(ROOT)) is True
    assert plugin.is_lsa("https://example.org/someone/lsa.git#main") is True
    assert plugin.is_lsa("https://example.org/someone/a-fork") is None  # its conda.yaml will tell
    assert plugin.is_lsa(str(tmp_path / "missing")) is False
    assert plugin.is_lsa("x" * 5000) is False
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "MLproject").write_bytes(b"# \xff not UTF-8\r\nname: lsa\r\n")
    assert plugin.is_lsa(f"{tmp_path}#inner") is True
    (tmp_path / "MLproject").write_text("name: lsa-like\n")
    assert plugin.is_lsa(str(tmp_path)) is False


def test_the_stand_in_acts_only_without_conda(tmp_path):
    run = ["mlflow", "run", "."]
    empty = {"PATH": str(tmp_path)}
    assert plugin.needs_stand_in(run, empty)
    assert plugin.needs_stand_in([*run, "-P", "--env-manager=1"], empty)
    assert not plugin.needs_stand_in([*run, "--env-manager", "local"], empty)
    assert not plugin.needs_stand_in([*run, "--env-manager=uv"], empty)
    assert not plugin.needs_stand_in(run, empty | {"LSA_CONDA_STANDIN": "off"})
    assert not plugin.needs_stand_in(run, empty | {"CONDA_EXE": "/opt/conda/bin/conda"})
    assert not plugin.needs_stand_in(run, empty | {"MLFLOW_CONDA_HOME": "/opt/conda"})
    (tmp_path / "conda").write_text("#!/bin/sh\n")
    (tmp_path / "conda").chmod(0o755)
    assert not plugin.needs_stand_in(run, empty)


def test_the_stand_in_serves_lsa_and_refuses_others(tmp_path):
    def create(file: Path) -> subprocess.CompletedProcess:
        command = [str(CONDA), "env", "create", "-n", "x", "--file", str(file), "--quiet"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert create(ROOT / "conda.yaml").returncode == 0
    (tmp_path / "conda.yaml").write_text("name: other\n")
    for refused in (create(tmp_path / "conda.yaml"), create(tmp_path / "missing.yaml")):
        assert refused.returncode == 127
        assert "Could not find Conda executable" in refused.stderr


def test_activating_says_so_and_takes_the_python_that_runs_mlflow():
    script = f"source {plugin.STAND_IN}/etc/profile.d/conda.sh && conda activate x 1>&2"
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{script} && python -c 'import os; print(os.getpid())' && echo not reached",
        ],
        env={"PATH": "/usr/bin:/bin", variables.PYTHON: sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().isdigit()  # the shell became Python, so nothing runs after it
    (line,) = done.stderr.splitlines()
    assert f"using the current Python, {sys.executable}" in line
    assert "LSA_CONDA_STANDIN=off" in line


def test_a_lost_executable_bit_is_given_back(tmp_path, monkeypatch):
    folder = tmp_path / "conda"
    shutil.copytree(plugin.STAND_IN, folder)
    (folder / "bin" / "conda").chmod(0o644)
    monkeypatch.setattr(plugin, "STAND_IN", folder)
    monkeypatch.setenv("MLFLOW_CONDA_HOME", "")  # so that what the call sets is undone
    monkeypatch.setenv(variables.PYTHON, "")
    plugin._use_stand_in()
    assert os.access(folder / "bin" / "conda", os.X_OK)
    assert plugin.LsaContext().in_context()


def test_addresses_of_stores_are_written_out(tmp_path, monkeypatch):
    """The project's command runs in the project's folder, where a relative one is another file."""
    (tmp_path / "s p").mkdir()
    monkeypatch.chdir(tmp_path / "s p")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///rel.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://host:5000")
    plugin._write_out_addresses()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/s p/rel.db"
    assert os.environ["MLFLOW_REGISTRY_URI"] == "http://host:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    plugin._write_out_addresses()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/s p/mlflow.db"


def test_it_is_registered_and_loads_neither_mlflow_nor_torch():
    (ours,) = (e for e in entry_points(group="mlflow.run_context_provider") if e.name == "lsa")
    assert ours.load() is plugin.LsaContext
    code = (
        "import sys, lsa.tracking.mlflow_plugin; "
        "print({'mlflow', 'torch', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.full
@pytest.mark.parametrize("program", [(str(MLFLOW),), (sys.executable, "-m", "mlflow")])
def test_without_conda_the_python_that_runs_mlflow_is_used(tmp_path, program):
    project = Project(tmp_path, "import sys; print('PREFIX', sys.prefix)")
    done = project.run(program=program, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert f"PREFIX {sys.prefix}\n" in done.stdout
    assert done.stderr.count("lsa: no conda here") == 1
    assert project.statuses() == ["FINISHED"]
    (environment,) = project.recorded_environment()
    assert str(Path(sys.executable).parent) in environment


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {"LSA_CONDA_STANDIN": "off"}, "Could not find Conda executable"),
        (["-P", "k;x=1"], {}, "Invalid value"),
    ],
)
def test_a_run_that_never_starts_ends_failed(tmp_path, arguments, variables, message):
    project = Project(tmp_path, "")
    done = project.run(*arguments, **variables)
    assert done.returncode == 1 and message in done.stderr
    assert project.statuses() == ["FAILED"]


@pytest.mark.full
def test_another_project_is_left_alone(tmp_path):
    project = Project(tmp_path, "", name="other")
    done = project.run()
    assert done.returncode == 1 and "Could not find Conda executable at conda" in done.stderr
    assert "lsa" not in done.stderr
    assert project.statuses() == ["RUNNING"]  # what MLflow does by itself
    assert project.recorded_environment() == []


@pytest.mark.full
def test_a_real_conda_is_used_in_silence(tmp_path):
    project = Project(tmp_path, "print('RAN')")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "activate").write_text("")
    (programs / "conda").write_text(
        '#!/bin/sh\necho "$*" >> calls\n[ "$2" = list ] && echo \'{"envs": []}\'\nexit 0\n'
    )
    (programs / "conda").chmod(0o755)
    done = project.run(PATH=f"{programs}:{project.environment['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "RAN" in done.stdout and "lsa:" not in done.stderr
    assert "env create -n" in (tmp_path / "calls").read_text()
    assert project.statuses() == ["FINISHED"] and project.recorded_environment() == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "to_group", "handles"),
    [
        (signal.SIGTERM, False, "yes"),
        (signal.SIGTERM, False, "no"),  # as while the child still imports torch
        (signal.SIGINT, False, "yes"),
        (signal.SIGINT, True, "yes"),  # Ctrl-C in a terminal
    ],
)
def test_a_signal_ends_mlflow_child_and_run(tmp_path, number, to_group, handles):
    project = Project(tmp_path, WAITS)
    with started(
        [str(MLFLOW), "run", "."],
        cwd=tmp_path,
        env=project.environment | {"HANDLES": handles},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 35
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        child = int((tmp_path / "pid").read_text())
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert project.statuses() == ["KILLED"]

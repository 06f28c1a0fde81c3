"""Every check of the doctor: what is right, what is not, and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import mlflow
import pytest
from processes import forked

import lsa
from lsa.cli import app, examination
from lsa.runtime import provenance
from lsa.tracking import runs, settings, store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The command sets these for its process."""
    monkeypatch.setenv(settings.RETRIES, "1")
    monkeypatch.setenv(settings.TIMEOUT, "10")


def looked(**options) -> dict[str, examination.Checked]:
    return {one.what: one for one in examination.examine(**options)}


def test_a_sound_machine_passes_in_one_line_each(workplace, capsys):
    store.client()
    assert app.run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [
        "versions",
        "environment",
        "device",
        "disk",
        "spool",
        "store",
        "artifacts",
        "late",
        "runs",
    ]
    assert [line.split()[1] for line in lines] == names
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    assert app.run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["what"] for one in document] == names
    assert all(one.keys() == {"what", "state", "found", "advice"} for one in document)


def test_a_store_that_is_not_there_yet_is_not_made(workplace):
    (workplace / "mlflow.db").unlink()
    found = looked()
    assert found["store"].state == "ok" and "the first run makes it" in found["store"].found
    assert "runs" not in found and not (workplace / "mlflow.db").exists()


@pytest.fixture
def dead_run(workplace) -> str:
    """A run whose process has ended without ending it."""
    code = (
        "from lsa.tracking import recording; import os\n"
        "with recording.run('left', experiment='e', tags={}, device='cpu') as run:\n"
        "    print(run.id, flush=True)\n"
        "    os._exit(9)\n"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store.uri()}
    done = forked(code=code, env=environment)
    return done.stdout.split()[-1]


def test_a_run_left_by_a_dead_process_is_told_and_ended_only_when_asked(dead_run, capsys):
    found = looked()["runs"]
    assert found.state == "warning" and f"left ({dead_run[:8]})" in found.found
    assert "--end-stale" in found.advice
    assert runs.read(dead_run).status == "RUNNING"
    assert app.run(["doctor", "--end-stale"]) == 0
    assert "ended 1 whose process is gone: left" in capsys.readouterr().out
    assert runs.read(dead_run).status == "KILLED"
    assert looked()["runs"].state == "ok"


def test_runs_of_living_processes_and_other_machines_are_left_alone(workplace):
    client = store.client()
    experiment = client.create_experiment("e")
    for tags in (provenance.machine("cpu"), {"lsa.host": "elsewhere", "lsa.process": "1@1"}):
        client.create_run(experiment, tags=tags)
    found = looked(end_stale=True)["runs"]
    assert (found.state, "2 are RUNNING, 1 of them on other" in found.found) == ("ok", True)
    assert len(runs.running()) == 2


def test_a_store_that_does_not_answer_fails_without_its_password(workplace, capsys):
    mlflow.set_tracking_uri("http://me:secret@127.0.0.1:9")
    assert app.run(["doctor"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.split()[1] == "store"]
    assert line.startswith("failure") and "secret" not in out and "runs " not in out


@pytest.mark.parametrize(("free", "state"), [(1e10, "ok"), (1e9, "warning"), (1e7, "failure")])
def test_little_space_is_told(workplace, monkeypatch, free, state):
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda _: Usage(1e11, 0, free))
    assert looked()["disk"].state == state


def test_without_conda_it_is_said_what_computes(workplace, monkeypatch):
    for name in ("MLFLOW_CONDA_HOME", "CONDA_EXE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(examination.shutil, "which", lambda *_, **__: None)
    assert "as there is no conda" in looked()["environment"].found
    monkeypatch.setenv("LSA_CONDA_STANDIN", "off")
    found = looked()["environment"]
    assert found.state == "warning" and "--env-manager local" in found.advice


def test_a_missing_package_fails(workplace, monkeypatch):
    versions = {"python": "3.12", "lsa": "not installed", "torch": "not installed"}
    monkeypatch.setattr(examination.provenance, "versions", lambda: versions)
    found = looked()["versions"]
    assert (found.state, found.advice) == ("failure", "pip install loss-landscape-analysis torch")


def test_results_that_wait_in_the_spool_are_told(workplace, monkeypatch):
    def read(path):
        if broken and path == "b":
            raise ValueError("b is damaged")

    broken = False
    monkeypatch.setattr(examination.spool, "entries", lambda: ["a", "b"])
    monkeypatch.setattr(examination.spool, "read", read)
    found = examination._looked("spool", examination._spool)
    assert found.state == "warning" and "2 results" in found.found and "lsa sync" in found.advice
    broken = True
    found = examination._looked("spool", examination._spool)
    assert found.state == "failure" and "b is damaged" in found.found


def test_a_store_that_was_copied_without_its_paths_is_seen_and_its_page_mends_it(
    trained, workplace, tmp_path_factory, monkeypatch, patience
):
    def artifacts() -> examination.Checked:
        return next(one for one in examination.examine() if one.what == "artifacts")

    assert artifacts().state == "ok"
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(workplace, copy, dirs_exist_ok=True)
    monkeypatch.chdir(copy)
    uri = f"sqlite:///{copy}/mlflow.db"
    store.use(uri, uri)
    assert artifacts().state == "warning" and "lie elsewhere" in artifacts().found
    shutil.move(workplace / "mlruns", workplace / "gone")
    assert artifacts().state == "failure" and "docs/moving.md" in artifacts().advice
    page = (Path(__file__).parents[2] / "docs" / "moving.md").read_text()
    script = page.partition("<<'END'\n")[2].partition("END\n")[0]
    paths = {"OLD": str(workplace), "NEW": str(copy)}
    subprocess.run([sys.executable, "-c", script], env=os.environ | paths, check=True)
    assert artifacts().state == "ok"
    assert lsa.load(trained.run_id).epoch == 2

"""One contract for every way to start lsa: stopped in mid-step, and with a worker killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from processes import started
from servers import environment, lsa

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds for anything, on a machine that others use too
PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: EPOCHS, batch_size: 50}
optimizers: {sgd: {name: SGD, lr: 0.02}, adamw: {name: AdamW, lr: 0.002}}
seeds: [0]
landscape: {samples: 64}
probes: {lanczos: {k: 1, density_steps: 5}}
"""
LSA = [sys.executable, "-m", "lsa"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lsa"]
MLFLOW = [str(Path(sys.executable).with_name("mlflow")), "run", str(ROOT), "--env-manager", "local"]
OF_SGD = ["--project", "tiny", "--optimizer", "sgd"]


@dataclass(frozen=True)
class Launcher:
    """A command and what its end looks like."""

    command: list[str]
    step: str  # that it is stopped in
    code: int | None = 143  # its exit code after SIGTERM; None for any but 0
    runs: int = 1  # that are RUNNING by then


LAUNCHERS = {
    "train": Launcher([*LSA, "train", *OF_SGD], "train"),
    "study": Launcher([*LSA, "study", "tiny", "--workers", "2"], "train", runs=3),
    "ray": Launcher([*LSA, "study", "tiny", "--engine", "ray", "--workers", "2"], "train", runs=2),
    "mlflow": Launcher([*MLFLOW, "-e", "train", "-P", "optimizer=sgd"], "train", None),
    "torchrun": Launcher(
        [*TORCHRUN, "lanczos", *OF_SGD, "--density-probes", "100000"], "lanczos", None
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the project and an empty store."""

    def make(epochs: int) -> Path:
        (tmp_path / "projects").mkdir()
        text = PROJECT.replace("EPOCHS", str(epochs))
        (tmp_path / "projects" / "tiny.yaml").write_text(text)
        lsa("checkpoints", cwd=tmp_path, env=outside(tmp_path))
        return tmp_path

    return make


def outside(folder: Path) -> dict[str, str]:
    return environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db")


def query(folder: Path, statement: str) -> list[tuple]:
    with sqlite3.connect(f"file:{folder}/mlflow.db?mode=ro", uri=True) as connection:
        return connection.execute(statement).fetchall()


def statuses(folder: Path, tag: str, value: str = "") -> list[str]:
    """Of the runs with a tag, of that value where one is given."""
    which = f"t.key = '{tag}'" + (f" and t.value = '{value}'" if value else "")
    return [
        s
        for (s,) in query(
            folder, f"select status from runs join tags t using (run_uuid) where {which}"
        )
    ]


def until(condition: Callable[[], bool], process, log: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        said = log.read_text() if log and process.poll() is not None else ""
        assert process.poll() is None, f"it ended before it was disturbed: {said}"
        assert time.monotonic() < deadline, "nothing ran"
        time.sleep(0.1)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_command_told_to_stop_leaves_no_process_and_no_open_run(name, folder):
    if name == "ray":
        pytest.importorskip("ray", reason="the extra for Ray is not installed")
    launcher, place = LAUNCHERS[name], folder(epochs=2 if name == "torchrun" else 3000)
    command = [*launcher.command]
    if name == "torchrun":
        lsa("train", *OF_SGD, cwd=place, env=outside(place))
    if name == "mlflow":  # its working folder is the project's source
        command += ["-P", f"project={place}/projects/tiny.yaml"]
    log = place / "said.txt"
    with (
        log.open("w") as said,
        started(command, cwd=place, env=outside(place), stdout=said, stderr=said) as process,
    ):
        until(lambda: statuses(place, "lsa.step").count("RUNNING") >= launcher.runs, process, log)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
        _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
    assert code == launcher.code or (launcher.code is None and code != 0), log.read_text()
    assert set(statuses(place, "lsa.step")) <= {"KILLED", "FINISHED"}
    assert "KILLED" in statuses(place, "lsa.step", launcher.step)
    if name in ("study", "ray"):
        assert statuses(place, "lsa.step", "study") == ["KILLED"]
    if name == "train":
        assert log.read_text() == "lsa: stopped by SIGTERM; the run is marked KILLED\n"


@pytest.mark.parametrize("name", ["study", "ray"])
def test_a_killed_worker_costs_its_step_another_try(name, folder):
    if name == "ray":
        pytest.importorskip("ray", reason="the extra for Ray is not installed")
    launcher, place = LAUNCHERS[name], folder(epochs=300)
    busy = (
        "select p.value from tags p join runs r using (run_uuid) join tags t using (run_uuid) "
        "where p.key = 'lsa.process' and r.status = 'RUNNING' "
        "and t.key = 'lsa.step' and t.value = 'train'"
    )
    with started(launcher.command, cwd=place, env=outside(place)) as process:
        until(lambda: bool(query(place, busy)), process)
        os.kill(int(query(place, busy)[0][0].partition("@")[0]), signal.SIGKILL)
        assert process.wait(PATIENCE) == 0
    steps = query(
        place,
        "select t.value, r.status from runs r join tags t using (run_uuid) where t.key = 'lsa.key'",
    )
    finished = [key for key, status in steps if status == "FINISHED"]
    assert len(finished) == len(set(finished)) == 4  # no key twice
    assert [status for _, status in steps if status != "FINISHED"] == ["KILLED"]
    assert statuses(place, "lsa.step", "study") == ["FINISHED"]
    done = "select value from latest_metrics where key = 'steps_done'"
    assert query(place, done) == [(4.0,)]

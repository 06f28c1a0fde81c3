"""A study killed at random moments and started again ends as one that was left in peace.

`LSA_KILLS=10 python -m pytest tests/studies/test_kill.py` kills ten times; two kills by default.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import started
from servers import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LONGEST = 3.0  # seconds between the first step of a study and its death
KILLS = int(os.environ.get("LSA_KILLS", "2"))
PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: EPOCHS, batch_size: 10}
optimizers: {sgd: {name: SGD, lr: 0.02}, adamw: {name: AdamW, lr: 0.002}}
seeds: SEEDS
landscape: {samples: 64}
probes: {lanczos: {k: 1}}
pairs: {interpolation: {points: 9}}
"""
STUDY = [sys.executable, "-m", "lsa", "study", "tiny", "--workers", "2"]


def start(folder: Path) -> contextlib.AbstractContextManager[subprocess.Popen]:
    """A study in its own process group, as a terminal starts it."""
    outside = environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db")
    return started(
        STUDY, cwd=folder, env=outside, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(folder: Path) -> None:
    """Run a study to its end."""
    with start(folder) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def until_a_step_runs(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the study of `process` has begun a step, or has ended."""
    running = (
        "select 1 from runs r join tags t using (run_uuid) join tags p on p.run_uuid = r.run_uuid "
        "where t.key = 'lsa.key' and r.status = 'RUNNING' "
        "and p.key in ('mlflow.parentRunId', 'lsa.study') "
        "and p.value = (select run_uuid from runs where name = 'study-tiny' and "
        "status = 'RUNNING' order by start_time desc limit 1)"
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(sqlite3.OperationalError):  # no store yet
            if query(folder, running):
                return
        time.sleep(0.05)


def query(folder: Path, what: str) -> list[tuple]:
    with sqlite3.connect(folder / "mlflow.db") as connection:
        return connection.execute(what).fetchall()


def numbers(folder: Path) -> dict[tuple[str, str], float]:
    """(run, metric) → value of every finished step, but for what a clock says."""
    rows = query(
        folder,
        "select r.name, m.key, m.value from latest_metrics m join runs r using (run_uuid) "
        "join tags t using (run_uuid) where t.key = 'lsa.key' and r.status = 'FINISHED' "
        "and m.key not like '%seconds%'",
    )
    return {(name, key): value for name, key, value in rows}


def prepared(folder: Path, epochs: int = 30, seeds: int = 1) -> Path:
    """A folder with the project."""
    text = PROJECT.replace("EPOCHS", str(epochs)).replace("SEEDS", str(list(range(seeds))))
    (folder / "projects").mkdir(parents=True)
    (folder / "projects" / "tiny.yaml").write_text(text)
    return folder


@pytest.mark.full
def test_kills_change_nothing(tmp_path):
    kills_change_nothing(prepared(tmp_path / "peace"), prepared(tmp_path / "war"), KILLS)


def kills_change_nothing(peace: Path, war: Path, kills: int, seeds: int = 1) -> int:
    """A study in peace and one that is killed so often end alike; how often it was killed."""
    finish(peace)
    moments = random.Random(0)
    hit = 0
    for i in range(kills):
        with start(war) as process:
            until_a_step_runs(war, process)
            time.sleep(moments.uniform(0, LONGEST))
            workers = psutil.Process(process.pid).children(recursive=True)
            if process.poll() is not None:
                break
            hit += 1
            if i % 2:
                os.killpg(process.pid, signal.SIGKILL)  # all at once, as when power fails
            else:
                process.kill()  # its workers must notice
            _, alive = psutil.wait_procs(workers, timeout=30)
            assert not alive
    assert hit > kills / 2  # a study that had ended before would show nothing
    finish(war)

    assert numbers(war) == numbers(peace)
    keys = "select t.value, r.name from tags t join runs r using (run_uuid) where t.key = 'lsa.key'"
    finished = query(war, keys + " and r.status = 'FINISHED'")
    assert len(finished) == 5 * seeds  # of each 2 trainings, 2 spectra, a line
    assert max(collections.Counter(key for key, _ in finished).values()) == 1  # no step twice
    assert query(war, "select name from runs where status = 'RUNNING'") == []
    study = "select status, count(*) from runs where name = 'study-tiny' group by status"
    assert query(war, study) == [("FINISHED", 1)]  # one run, however often it was killed
    return hit

"""The tracking server is killed: while a training runs, while a probe measures, and for good."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mlflow
from processes import started
from servers import IMPATIENT, LSA, Served, environment, lsa

from faults import Row

PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: EPOCHS, batch_size: 50, checkpoint_every: 20}
optimizers: {sgd: {name: SGD, lr: 0.02}, adamw: {name: AdamW, lr: 0.002}}
seeds: [0]
landscape: {samples: 64}
probes: {lanczos: {k: 1, density_steps: 5}}
"""
PATIENCE = 400.0  # seconds for anything, on a machine that others use too


def rows(folder: Path, times: int = 3) -> list[Row]:
    """The faults of this module."""
    return [in_training(folder, times), in_a_probe(folder, times), for_good(folder)]


def in_training(folder: Path, times: int) -> Row:
    """Kill it while epochs are logged, start it again."""
    with server(folder / "training", epochs=60) as (served, client):
        env = environment(MLFLOW_TRACKING_URI=served.uri)
        for i in range(times):
            command = ["train", "--project", "tiny", "--optimizer", "sgd", "--seed", str(i)]
            code, _ = interrupted(served, client, env, command, lambda: epochs(served.uri, 5))
            assert code == 0
            (run,) = runs(served.uri, f"tags.seed = '{i}'")
            history = asking(served.uri).get_metric_history(run.info.run_id, "val/loss")
            assert run.info.status == "FINISHED"
            assert [m.step for m in history] == list(range(1, 61))  # each epoch, once
            asked = asking(served.uri)
            kept = asked.search_logged_models(  # those on the way have an experiment of their own
                [e.experiment_id for e in asked.search_experiments()],
                f"tags.`lsa.key` = '{run.data.tags['lsa.key']}'",
            )
            assert sorted(int(m.tags["epoch"]) for m in kept) == [0, 20, 40, 60]
        assert len(runs(served.uri, "")) == times
    return Row(
        "server killed in a training",
        "SIGKILL to all its processes after epoch 5 of 60; started again at once",
        times,
        "nothing: every epoch and checkpoint is stored exactly once",
        "nothing, exit code 0; the training waits at most about a minute for the server",
    )


def in_a_probe(folder: Path, times: int) -> Row:
    """Kill it while a probe measures, start it again."""
    with server(folder / "probe", epochs=2) as (served, client):
        env = environment(MLFLOW_TRACKING_URI=served.uri)
        lsa("train", "--project", "tiny", "--optimizer", "sgd", cwd=client, env=env)
        for i in range(times):
            command = ["lanczos", "--project", "tiny", "--optimizer", "sgd", "--rng-seed", str(i)]
            mine = f"params.rng_seed = '{i}'"

            def measures(mine: str = mine) -> bool:
                return bool(runs(served.uri, f"{mine} and attributes.status = 'RUNNING'"))

            code, _ = interrupted(served, client, env, command, measures)
            assert code == 0
            (run,) = runs(served.uri, mine)
            assert run.info.status == "FINISHED" and run.data.metrics["lanczos/lambda_max"] > 0
    return Row(
        "server killed in a probe",
        "SIGKILL to all its processes while the run is RUNNING; started again at once",
        times,
        "nothing: one finished run with every number and file",
        "nothing, exit code 0",
    )


def for_good(folder: Path) -> Row:
    """Kill it during a study and leave it so until the study has ended."""
    client, uri = alone(folder / "peace", epochs=60)
    lsa("study", "tiny", cwd=client, env=environment(MLFLOW_TRACKING_URI=uri))
    expected = numbers(uri)
    with server(folder / "good", epochs=60) as (served, client):
        env = environment(MLFLOW_TRACKING_URI=served.uri, **IMPATIENT)
        command = ["study", "tiny"]
        code, told = interrupted(
            served, client, env, command, lambda: epochs(served.uri, 5), again=False
        )
        assert code == 75 and "Traceback" not in told, told
        waits = [line for line in told.splitlines() if line.startswith("lsa: ")]
        assert len(waits) == 1 and re.search("2 of the study's 4 steps are measured, not", waits[0])
        lsa("sync", cwd=client, env=env, code=75)  # nobody is there yet
        served.start()
        lsa("sync", cwd=client, env=env)
        once = {name for name, _ in numbers(served.uri)}
        assert once == {"sgd·train·s0", "adamw·train·s0"}
        lsa("study", "tiny", cwd=client, env=env)
        assert numbers(served.uri) == expected
    return Row(
        "server killed for good in a study",
        "SIGKILL to all its processes in the first of 4 steps; started again after the study's end",
        1,
        "nothing: `lsa sync` delivered both trainings, the next start of the study measured the "
        "probes; all numbers equal those of an undisturbed study",
        f"one line, exit code 75: “{waits[0].replace(served.uri, 'http://…')}”",
    )


# --- how ------------------------------------------------------------------------------------------


def alone(folder: Path, *, epochs: int) -> tuple[Path, str]:
    """A client's folder with the project, and the address of a store of its own."""
    (folder / "projects").mkdir(parents=True)
    (folder / "projects" / "tiny.yaml").write_text(PROJECT.replace("EPOCHS", str(epochs)))
    return folder, f"sqlite:///{folder}/mlflow.db"


@contextlib.contextmanager
def server(folder: Path, *, epochs: int):
    """A server and the folder of a client with the project."""
    client, _ = alone(folder / "client", epochs=epochs)
    with Served(folder) as served:
        yield served, client


def interrupted(
    served: Served,
    client: Path,
    env: Mapping[str, str],
    command: list[str],
    now: Callable[[], bool],
    *,
    again: bool = True,
) -> tuple[int, str]:
    """Run a command, kill the server once `now` is true; the exit code and what was said."""
    log = client / "said.txt"
    with (
        log.open("w") as said,
        started([*LSA, *command], cwd=client, env=env, stdout=said, stderr=said) as process,
    ):
        deadline = time.monotonic() + PATIENCE
        while not now():
            assert process.poll() is None, f"it ended before it was disturbed: {log.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        served.kill()
        assert process.poll() is None, "it ended before it was disturbed"
        if again:
            served.start()
        try:
            return process.wait(PATIENCE), log.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it never ended: {log.read_text()}") from None


def asking(uri: str) -> mlflow.MlflowClient:
    """A client of that store and its own registry, whichever the tests of this process have set."""
    return mlflow.MlflowClient(uri, registry_uri=uri)


def runs(uri: str, criteria: str) -> list:
    """Runs of every experiment."""
    client = asking(uri)
    return list(
        client.search_runs([e.experiment_id for e in client.search_experiments()], criteria)
    )


def epochs(uri: str, count: int) -> bool:
    """Whether a training that runs has come so far."""
    running = runs(uri, "attributes.status = 'RUNNING' and tags.`lsa.step` = 'train'")
    client = asking(uri)
    return any(len(client.get_metric_history(r.info.run_id, "val/loss")) >= count for r in running)


def numbers(uri: str) -> dict[tuple[str, str], float]:
    """(step, metric) → value of every finished step, but for what a clock says; each step once."""
    found = runs(uri, "attributes.status = 'FINISHED' and tags.`lsa.key` != ''")
    keys = [run.data.tags["lsa.key"] for run in found]
    assert len(keys) == len(set(keys)), json.dumps(sorted(keys))
    return {
        (run.info.run_name, key): value
        for run in found
        for key, value in run.data.metrics.items()
        if "seconds" not in key
    }

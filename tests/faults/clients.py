"""Clients are stopped, crowded, and told the wrong time; their workers are killed."""

from __future__ import annotations

import collections
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from processes import command, forked, started
from servers import LSA, Served, environment, lsa

from faults import Row
from faults.server import PATIENCE, alone, asking, numbers, runs

CLIENTS = 24


def rows(folder: Path) -> list[Row]:
    """The faults of this module."""
    return [
        stopped(folder / "stopped", 3),
        killed_at_the_end(folder / "end", 12),
        worker_killed(folder / "worker"),
        crowd(folder / "sqlite", CLIENTS, served=False),
        crowd(folder / "http", CLIENTS, served=True),
        wrong_clock(folder / "clock"),
    ]


def stopped(folder: Path, times: int) -> Row:
    """SIGTERM to a training."""
    client, uri = alone(folder, epochs=120)
    env = environment(MLFLOW_TRACKING_URI=uri)
    words = ["train", "--project", "tiny", "--optimizer", "sgd"]
    for i in range(times):
        began = time.time()
        log = client / f"said-{i}.txt"
        with command(*words, cwd=client, env=env, stdout=log, stderr=log) as process:
            until(lambda began=began: saved(client) > began)  # an epoch of this very process
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
            process.join(PATIENCE)
            assert process.exitcode == 143, log.read_text()
        told = log.read_text().splitlines()
        assert told == ["lsa: stopped by SIGTERM; the run is marked KILLED"], told
        assert count(client, "status = 'KILLED'") == i + 1
        assert count(client, "status = 'RUNNING'") == 0
    lsa(*words, cwd=client, env=env)
    (finished,) = runs(uri, "attributes.status = 'FINISHED'")
    resumed = int(finished.data.tags["lsa.resumed_epoch"])
    assert resumed > 0 and int(finished.data.params["epochs"]) == 120
    return Row(
        "client stopped",
        "SIGTERM to a training",
        times,
        f"nothing: the next start continued after epoch {resumed} of 120",
        f"exit code 143: “{told[0]}”",
    )


def killed_at_the_end(folder: Path, times: int) -> Row:
    """SIGKILL to a training that has trained its last epoch, while its result is logged."""
    client, uri = alone(folder, epochs=2)
    env = environment(MLFLOW_TRACKING_URI=uri)
    lsa("checkpoints", cwd=client, env=env)
    moments, hit = random.Random(0), 0
    for seed in range(times):
        command = ["train", "--project", "tiny", "--optimizer", "sgd", "--seed", str(seed)]
        with started([*LSA, *command], cwd=client, env=env, stdout=subprocess.DEVNULL) as process:
            until(lambda p=process: p.poll() is not None or kept(client))
            time.sleep(moments.uniform(0, 0.4))
            hit += process.poll() is None
            process.kill()
        ended = runs(uri, f"tags.seed = '{seed}' and attributes.status = 'FINISHED'")
        if kept(client) or not ended:  # else it was killed when all was done
            lsa(*command, cwd=client, env=env)
        assert not kept(client)
    assert hit > times / 2  # what had ended before shows nothing
    assert count(client, "status = 'RUNNING'") == 0
    finished = [r for r in runs(uri, "tags.`lsa.step` = 'train'") if r.info.status == "FINISHED"]
    assert len({r.data.tags["lsa.key"] for r in finished}) == times == len(finished)
    models = asking(uri).search_logged_models([finished[0].info.experiment_id])
    assert {str(m.status) for m in models} == {"READY"}
    assert sum(m.tags["epoch"] == "2" for m in models) == times
    return Row(
        "client killed while it logs",
        "SIGKILL to a training 0 to 0.4 s after its last epoch",
        hit,
        "nothing: the next start logs the kept results; no run and no checkpoint stays half made",
        "the process ends",
    )


def worker_killed(folder: Path) -> Row:
    """SIGKILL to one of two workers of a study."""
    client, uri = alone(folder, epochs=120)
    env = environment(MLFLOW_TRACKING_URI=uri)
    command = [*LSA, "study", "tiny", "--workers", "2"]
    with started(command, cwd=client, env=env, stdout=subprocess.DEVNULL) as process:
        until(lambda: saved(client) > 0 and count(client, "status = 'RUNNING'") == 3)
        busy = [
            int(run.data.tags["lsa.process"].partition("@")[0])
            for run in runs(uri, "attributes.status = 'RUNNING' and tags.`lsa.step` = 'train'")
        ]
        psutil.Process(busy[0]).kill()
        assert process.wait(PATIENCE) == 0
    assert {name for name, _ in numbers(uri)} == {
        "sgd·train·s0", "adamw·train·s0", "sgd·lanczos·s0", "adamw·lanczos·s0",
    }  # fmt: skip
    assert count(client, "status = 'RUNNING'") == 0
    return Row(
        "worker killed",
        "SIGKILL to one of the two workers of a study, in a training",
        1,
        "nothing: its step runs once more, a training from its last epoch",
        "nothing, exit code 0",
    )


CROWD = """
import os, sys
import torch
import mlflow
import lsa.figures.lanczos
from lsa import project
from lsa.studies import measure, train
from lsa.tracking import checkpoint, registry, spool
torch.set_num_threads(1)
checkpoint.load_data(project.load("tiny").recipe("sgd"), "cpu")  # before they part, so once

def client(seed):
    recipe = project.load("tiny").recipe("sgd", seed)
    try:
        done = train.train(recipe, reuse=True)
        source = registry.fetch(done.checkpoint)
        measure.measure("lanczos", source, k=1, density_steps=5, reuse=True)
    except spool.NotLogged as error:
        print(error, file=sys.stderr)
        return 75
    return 0

children = []
for seed in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        os._exit(client(seed))
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(*codes)
"""


def crowd(folder: Path, clients: int, *, served: bool) -> Row:
    """So many processes train and measure at once."""
    client, uri = alone(folder, epochs=3)
    if not served:
        lsa("checkpoints", cwd=client, env=environment(MLFLOW_TRACKING_URI=uri))
        return _crowd(client, uri, clients, "one SQLite file")
    with Served(folder) as server:
        return _crowd(client, server.uri, clients, "one server (SQLite, one process)")


def _crowd(client: Path, uri: str, clients: int, where: str) -> Row:
    env = environment(MLFLOW_TRACKING_URI=uri)
    began = time.monotonic()
    crowd = {"code": CROWD, "cwd": client, "env": env, "timeout": 3 * PATIENCE}
    ran = forked(str(clients), **crowd)
    seconds = time.monotonic() - began
    codes = [int(code) for code in ran.stdout.split()]
    assert len(codes) == clients and set(codes) <= {0, 75}, (ran.stdout, ran.stderr)
    late = codes.count(75)
    if late:  # what was late is delivered, what had to wait for it measured
        lsa("sync", cwd=client, env=env)
        assert forked(str(clients), **crowd).returncode == 0
    steps = collections.Counter(name.split("·")[1] for name in {n for n, _ in numbers(uri)})
    assert steps == {"train": clients, "lanczos": clients}
    registered = lsa("checkpoints", cwd=client, env=env).stdout.count("models:/tiny.sgd/")
    assert registered == clients
    waited = f"{late} of them got one line and exit code 75" if late else "nothing, exit code 0"
    return Row(
        f"{clients} clients at once on {where}",
        f"each trains 3 epochs and measures, in {seconds:.0f} s",
        1,
        f"nothing: {2 * clients} finished steps, {clients} registered checkpoints, no duplicates",
        waited,
    )


SKEWED = """
import sys, time
offset, true = float(sys.argv.pop(1)), time.time
time.time = lambda: true() + offset
from lsa.__main__ import main
main()
"""


def wrong_clock(folder: Path) -> Row:
    """Clients whose clocks are a day ahead and a day behind share a server."""
    day = 86_400
    client, _ = alone(folder, epochs=3)
    with Served(folder) as served:
        env = environment(MLFLOW_TRACKING_URI=served.uri)

        def at(offset: int, *command: str) -> str:
            settings = {"code": SKEWED, "cwd": client, "env": env, "timeout": PATIENCE}
            done = forked(str(offset), *command, **settings)
            assert done.returncode == 0, done.stderr
            return done.stdout

        at(day, "study", "tiny")
        expected = numbers(served.uri)
        for offset in (-day, day):  # nothing is done twice, whoever asks
            assert ": 4 reused" in at(offset, "study", "tiny")
        assert numbers(served.uri) == expected
        again = at(-day, "train", "--project", "tiny", "--optimizer", "sgd")
        newest = at(0, "show", "--project", "tiny", "--optimizer", "sgd")
        assert again.split()[-1] in newest  # by the registry's count, not by a clock
        at(0, "report", "tiny")
        started = [run.info.start_time for run in runs(served.uri, "")]
        assert max(started) - min(started) > 1.9 * day * 1000  # the clocks were believed
        ended = [run.info.end_time - run.info.start_time for run in runs(served.uri, "")]
        assert min(ended) >= 0
    return Row(
        "wrong clocks",
        "clients with clocks a day ahead, a day behind and correct, in turn on one server",
        6,
        "nothing: no step runs twice, the newest checkpoint is the one registered last",
        "the UI sorts runs by their clients' clocks",
    )


# --- how ------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(random.uniform(0.02, 0.1))


def saved(client: Path) -> float:
    """When a training's state was written last, in seconds since 1970; 0 before the first."""
    states = (client / ".lsa" / "training").glob("*.safetensors")
    return max((state.stat().st_mtime for state in states), default=0.0)


def kept(client: Path) -> bool:
    """Whether a result waits in a client's spool."""
    return any(path.suffix != ".part" for path in (client / ".lsa" / "spool").glob("*"))


def count(client: Path, criteria: str) -> int:
    """Runs in a client's own store."""
    if not os.path.exists(client / "mlflow.db"):
        return 0
    with sqlite3.connect(f"file:{client}/mlflow.db?mode=ro", uri=True) as connection:
        return connection.execute(f"select count(*) from runs where {criteria}").fetchone()[0]

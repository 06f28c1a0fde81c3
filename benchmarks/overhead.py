"""`python -m benchmarks.overhead`: what a step costs beside its arithmetic.

    python -m benchmarks.overhead --store postgresql+psycopg2://… --runs 0,10000 --engines ray

The step is a probe that does next to nothing. Tracking is measured on an empty store and on one
that already holds the runs of a large study, which are copies of one real run; scheduling on steps
that are not tracked at all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Annotated, Any

import mlflow
import numpy as np
import sqlalchemy
import torch

import lsa
from benchmarks.summary import table
from lsa import project as projects
from lsa.figures import draw
from lsa.probe import Curve, Metric, Result, find, probe
from lsa.project import Project
from lsa.studies import measure, study
from lsa.studies.calls import Call
from lsa.studies.engines import local, ray_tasks
from lsa.tracking import runs

PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: 1, batch_size: 50}
optimizers: {sgd: {name: SGD, lr: 0.1}}
"""
COPIED = ("runs", "tags", "params", "metrics", "latest_metrics")  # tables of a run


@probe()
def nothing(theta: torch.Tensor, *, p: Annotated[float, "order of the norm"] = 2.0) -> Result:
    """Norm of the weights: a step that costs nothing itself, but logs numbers and a figure."""
    norm = torch.linalg.vector_norm(theta, p).item()
    grid = np.linspace(0, 1, 41)
    metrics = {f"norm_{i}": Metric(norm, "", {"data": 0.0}) for i in range(10)}
    return Result(metrics, {"line": Curve(grid, norm * grid, "fraction")})


# --- tracking ----------------------------------------------------------------------------------


def tracked(address: str, sizes: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step and of finding that it is done, by the number of runs in a store."""
    trained = lsa.step("train", project="overhead", optimizer="sgd")
    source = lsa.load(trained.run_id)
    template = measure.measure("nothing", source, p=0.5)
    key = runs.finished_steps("overhead")
    known = next(done.tags["lsa.key"] for done in key if done.run_id == template.run_id)
    declared, ballast = find("nothing"), 0
    for size in sorted(sizes):
        fill(address, template.run_id, size - ballast)
        ballast = size
        orders = iter(range(1, 10**6))

        def alone() -> None:
            measure.call_probe(declared, [source], 0, None, {"p": 2.0})

        def drawn() -> None:
            result = measure.call_probe(declared, [source], 0, None, {"p": 2.0})
            draw.pictures("nothing", result, "title")

        def step(orders: Iterator[int] = orders, size: int = size) -> None:
            measure.measure("nothing", source, reuse=True, p=size + next(orders) / 1000)

        yield {
            "store": address.partition(":")[0],
            "runs in it": size,
            "computing, ms": milliseconds(alone, rounds),
            "tracked step, ms": milliseconds(step, rounds),
            "of it figure, ms": milliseconds(drawn, rounds),
            "finding it done, ms": milliseconds(lambda: runs.every_finished(known), rounds),
        }


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of some runs, after one that warms up."""
    took = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took[1:])


def fill(address: str, run_id: str, copies: int) -> None:
    """Put copies of a run into the store, each with a key of its own."""
    if not copies:
        return
    engine = sqlalchemy.create_engine(address)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine, only=COPIED)
    names = [uuid.uuid4().hex for _ in range(copies)]
    with engine.begin() as connection:
        for name in COPIED:
            copied = tables.tables[name]
            rows = connection.execute(copied.select().where(copied.c.run_uuid == run_id))
            for row in [dict(row._mapping) for row in rows]:
                mine = row.get("key") == "lsa.key"
                connection.execute(
                    copied.insert(),
                    [row | {"run_uuid": n} | ({"value": n} if mine else {}) for n in names],
                )
        if engine.dialect.name == "postgresql":  # which does so by itself, a minute later
            connection.execute(sqlalchemy.text("ANALYZE"))
    engine.dispose()


# --- scheduling --------------------------------------------------------------------------------


class Instant(local.Inline):
    """Two workers whose steps are done when they are submitted: the study's own cost is left."""

    background = True
    slots = 2

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """A future that is done."""
        done: Future = Future()
        done.set_result(Result({}))
        return done


def bookkeeping(setting: Project, checkpoints: int, probes: int) -> float:
    """Seconds of a study's own, per step."""
    running = study.Study(setting, Instant())
    began = time.perf_counter()
    for seed in range(checkpoints):
        trained = running.step("train", optimizer="sgd", seed=seed)
        for k in range(probes):
            running.step("nothing", trained, p=float(k + 1))
    running.advance()
    return (time.perf_counter() - began) / (checkpoints * (1 + probes))


def sized(_: Call) -> int:
    """A call of which only the way to a worker and back remains."""
    return 0


@contextlib.contextmanager
def engine(name: str, workers: int) -> Iterator[Any]:
    """An engine by its name."""
    if name == "ray":
        offered = ray_tasks.connect(None)
        demand = functools.partial(
            ray_tasks.demand, offered=offered, peaks={}, device="cpu", workers=workers
        )
        made: Any = ray_tasks.RayTasks(demand, "overhead", "")
    else:
        made = local.Processes(workers, None)
    try:
        yield made
    finally:
        made.shutdown()


def dispatched(name: str, setting: Project, calls: int, workers: int) -> dict[str, Any]:
    """Milliseconds per step of an engine, its workers being there."""
    call = Call("nothing", setting, ("sgd",), (0,), {"p": 2.0})
    with engine(name, workers) as made:
        wait([made.submit(sized, call) for _ in range(4 * workers)])
        began = time.perf_counter()
        wait([made.submit(sized, call) for _ in range(calls)])
        took = time.perf_counter() - began
    return {"engine": name, "steps": calls, "workers": workers, "ms per step": 1000 * took / calls}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--store", help="a database; default: SQLite in a folder of its own")
    parser.add_argument("--runs", default="0,11000", help="sizes of the store; '' for none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--study", default="100x10,1000x10", help="checkpoints x probes, …")
    parser.add_argument("--engines", default="processes", help="processes,ray; '' for none")
    parser.add_argument("--calls", type=int, default=2000)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("projects").mkdir()
        Path("projects/overhead.yaml").write_text(PROJECT)
        setting = projects.load("overhead")
        address = chosen.store or f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(address)
        mlflow.set_registry_uri(address)
        sizes = [int(size) for size in chosen.runs.split(",") if size]
        if sizes:
            print(table(list(tracked(address, sizes, chosen.rounds))), flush=True)
        rows = []
        for shape in filter(None, chosen.study.split(",")):
            checkpoints, probes = map(int, shape.split("x"))
            each = 1000 * bookkeeping(setting, checkpoints, probes)
            rows.append({"study": shape, "its own bookkeeping, ms per step": each})
        if rows:
            print("\n" + table(rows), flush=True)
        names = [name for name in chosen.engines.split(",") if name]
        if names:
            found = [dispatched(name, setting, chosen.calls, 2) for name in names]
            print("\n" + table(found), flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()

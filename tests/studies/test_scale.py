"""A store of many runs costs no more questions than a small one. Seconds: `docs/scaling.md`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import scale
import synthetic
from packaging.version import Version
from processes import forked
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lsa import project
from lsa.reports import measurements, report
from lsa.studies import plan
from lsa.tracking import registered, runs, store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
SMALL = """
dataset: {name: digits, train_limit: 100, val_limit: 50}
model: {name: mlp, hidden: [4]}
train: {epochs: 4, checkpoint_every: 2}
optimizers: {sgd: {name: SGD, lr: 0.1}, adamw: {name: AdamW, lr: 0.01}}
seeds: SEEDS
probes: {lanczos: {k: 1}, sgd_noise: {}}
trajectory: {lanczos: {k: 1}}
"""


@contextlib.contextmanager
def queries() -> Iterator[list[str]]:
    """SQL that is executed inside."""
    seen: list[str] = []

    def listen(_connection, _cursor, statement, *_):
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", listen)


def asked(question) -> int:
    question()  # what is asked once per process is not counted
    with queries() as seen:
        question()
    return len(seen)


def costs(name: str, seeds: int) -> dict[str, int]:
    """Number of queries of each question about a project."""
    setting = project.load(name)
    versions = store.client().search_model_versions(f"name = '{name}.sgd'")
    run = versions[0].run_id
    return {
        "find": asked(lambda: registered.find(name, "adamw", seeds - 1)),
        "resolve": asked(lambda: registered.resolve(run)),
        "resolve a beginning": asked(lambda: registered.resolve(run[:16])),
        "plan": asked(lambda: plan.outlook(setting)),
        "list": asked(lambda: registered.listing(name)),
        "stale": asked(lambda: runs.end_stale("project", name)),
        "measured": asked(lambda: measurements.newest(setting)),
    }


def test_questions_do_not_grow_with_the_runs(workplace):
    for name, seeds in (("few", 2), ("many", 12)):
        file = workplace / "projects" / f"{name}.yaml"
        file.write_text(SMALL.replace("SEEDS", str(list(range(seeds)))))
        store.client()
        scale.fill(workplace / "mlflow.db", projects=[name], seeds=seeds)
    few, many = costs("few", 2), costs("many", 12)
    if Version(mlflow.__version__) < Version("3.17"):  # it asks thrice about each checkpoint found
        checkpoints = 10 * 2 * 3  # more seeds, of so many optimizers, kept at epochs 0, 2 and 4
        for name in ("list", "plan"):
            assert many.pop(name) - few.pop(name) <= 3 * checkpoints
    assert few == many
    assert max(many.values()) < 40


def report_costs(folder: Path, seeds: int) -> int:
    """Queries of a report."""
    name = f"three{seeds}"
    text = synthetic.PROJECT.replace("SEEDS", str(list(range(seeds))))
    (folder / "projects" / f"{name}.yaml").write_text(text)
    synthetic.study(name, range(seeds))
    setting = project.load(name)
    return asked(lambda: report.report(setting))


@pytest.mark.full
def test_a_report_asks_for_no_run_by_itself(workplace):
    assert report_costs(workplace, 1) == report_costs(workplace, 3) < 40


QUESTIONS = """
import json, time
from lsa import project
from lsa.studies import plan
from lsa.tracking import registered
from lsa.reports import report

setting = project.load("ten")
seconds = []
for question in (
    lambda: registered.find("p0", "muon", 13),
    lambda: plan.outlook(setting),
    lambda: report.report(setting),
):
    question()  # what a process does once
    began = time.process_time()
    for _ in range(3):
        question()
    seconds.append(time.process_time() - began)
print(json.dumps(seconds))
"""


def seconds() -> list[float]:
    """Processor time of three questions.

    In a process of its own, as a user asks: in one that holds the objects of a thousand tests,
    Python's garbage collector takes as long as the questions.
    """
    return json.loads(forked(code=QUESTIONS).stdout.splitlines()[-1])


@pytest.mark.full
def test_ten_thousand_runs_are_no_burden(workplace, monkeypatch):
    """The same questions, before and after 19 other projects have filled the store."""
    file = workplace / "projects" / "ten.yaml"
    file.write_text(synthetic.PROJECT.replace("SEEDS", str(list(range(10)))))
    synthetic.study("ten", range(10))
    database = workplace / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    few = scale.fill(database, projects=["p0"], seeds=20)
    before = seconds()
    more = scale.fill(database, projects=[f"p{i}" for i in range(1, 20)], seeds=20)
    assert (few[0] + more[0], few[1] + more[1]) == (10_000, 2_000)
    after = seconds()
    assert all(b < 2 * a + 0.3 for a, b in zip(before, after, strict=True)), (before, after)

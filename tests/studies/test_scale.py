"""A store of many runs costs no more questions than a small one. Seconds: `docs/scale.md`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import scale
import synthetic
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lsa import measurements, plan, plots, project
from lsa.memory import registered, runs, store
from lsa.reports import drawings, report

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


def test_a_report_asks_for_no_run_by_itself(workplace):
    assert report_costs(workplace, 1) == report_costs(workplace, 3) < 40


def test_a_figure_is_drawn_again_only_when_what_it_shows_has_changed(workplace, monkeypatch):
    drawn = []

    def draw(names, line):
        drawn.append(line)
        return plots.barriers(names, line, {}, ("a", "b"))

    monkeypatch.setattr(drawings.provenance, "code_hash", lambda module: code[0])
    code = ["1"]
    line = {("sgd", "adamw"): 1.0}
    first = drawings.png(draw, ["sgd", "adamw"], line)
    assert drawings.png(draw, ["sgd", "adamw"], line) == first and len(drawn) == 1
    assert drawings.png(draw, ["sgd", "adamw"], {("sgd", "adamw"): 2.0}) != first
    assert len(drawn) == 2
    code[0] = "2"  # edited drawing code
    drawings.png(draw, ["sgd", "adamw"], line)
    assert len(drawn) == 3
    for file in (workplace / drawings.FOLDER).glob("*.png"):
        file.write_bytes(first[:100])  # cut off by a full disk
    assert drawings.png(draw, ["sgd", "adamw"], line) == first and len(drawn) == 4
    monkeypatch.setattr(drawings, "KEPT", 2)
    for i in range(4):
        drawings.png(draw, ["sgd", "adamw"], {("sgd", "adamw"): 3.0 + i})
    assert len(list((workplace / drawings.FOLDER).glob("*"))) == 2


QUESTIONS = """
import json, time
from lsa import plan, project
from lsa.memory import registered
from lsa.reports import report

setting = project.load("ten")
seconds = []
for question in (
    lambda: registered.find("p7", "muon", 13),
    lambda: plan.outlook(setting),
    lambda: report.report(setting),
):
    question()  # what a process does once; and the figures are drawn
    began = time.process_time()
    question()
    seconds.append(time.process_time() - began)
print(json.dumps(seconds))
"""


@pytest.mark.slow
def test_ten_thousand_runs_are_no_burden(workplace, monkeypatch):
    """In processor time, which others on the machine do not change.

    In a process of its own, as a user asks: in one that holds the objects of a thousand tests,
    Python's garbage collector takes as long as the questions.
    """
    file = workplace / "projects" / "ten.yaml"
    file.write_text(synthetic.PROJECT.replace("SEEDS", str(list(range(10)))))
    synthetic.study("ten", range(10))
    projects = [f"p{i}" for i in range(20)]
    made = scale.fill(workplace / "mlflow.db", projects=projects, seeds=20)
    assert made == (10_000, 2_000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    asking = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", QUESTIONS],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = json.loads(asking.stdout.splitlines()[-1])
    assert len(seconds) == 3 and max(seconds) < 2, seconds

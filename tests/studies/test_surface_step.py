"""A surface as a tracked step: several checkpoints, a training's path, and a kill on the way."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from processes import started

import lsa
from lsa import project
from lsa.cli import app
from lsa.project import Project
from lsa.reports import measurements, records
from lsa.runtime.errors import InputError
from lsa.studies import measure, partial, train
from lsa.tracking import runs

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

PATHS = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: 3, batch_size: 50, checkpoint_every: 1}
optimizers:
  sgd: {name: SGD, lr: 0.1}
  adamw: {name: AdamW, lr: 0.01}
  momentum: {name: SGD, lr: 0.05, momentum: 0.9}
landscape: {samples: 64}
"""


@pytest.fixture
def setting(workplace: Path) -> Project:
    """A project with three trained optimizers, every epoch kept."""
    (workplace / "projects" / "paths.yaml").write_text(PATHS)
    setting = project.load("paths")
    for optimizer in setting.optimizers:
        train.train(setting.recipe(optimizer))
    return setting


def files(run_id: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id))


def test_a_plane_through_three_checkpoints_names_and_links_them(setting, capsys):
    command = "surface --project paths --optimizer sgd --plane checkpoints --points 5".split()
    assert app.run([*command, "--optimizer_b", "adamw", "--optimizer_c", "momentum"]) == 0
    run_id = capsys.readouterr().out.split()[-1]
    grid = np.load(files(run_id) / "surface.npz")
    sources = [lsa.load(optimizer=name, project="paths") for name in setting.optimizers]
    assert list(grid["mark"]) == ["checkpoint", "adamw", "momentum"]
    assert grid["mark_loss"] == pytest.approx([s.landscape.loss(s.theta) for s in sources])
    found = mlflow.MlflowClient().get_run(run_id)
    assert {m.model_id for m in found.inputs.model_inputs} == {s.model_id for s in sources}
    shown = records.run(runs.read(run_id))
    assert [one["run"] for one in shown["checkpoints"]] == [s.run_id for s in sources]
    assert (files(run_id) / "surface.html").read_text().startswith("<!doctype html>")
    # it is no property of one checkpoint or pair, so no table may show it as such
    assert not [m for m in measurements.newest(setting) if m.step == "surface"]
    assert app.run([*command, "--optimizer_b", "adamw"]) == 2
    assert "three checkpoints, and 2 given" in capsys.readouterr().err


def test_the_plane_of_a_training_has_all_that_it_kept(setting):
    source = lsa.load(optimizer="sgd", project="paths")
    done = measure.measure("surface", source, plane="trajectory", points=5)
    grid = np.load(files(done.run_id) / "surface.npz")
    assert list(grid["mark"]) == ["epoch 0", "epoch 1", "epoch 2", "checkpoint"]
    assert grid["mark_loss"][-1] == pytest.approx(source.landscape.loss(source.theta))
    start = source.landscape.loss(source.theta_init)
    assert grid["mark_loss"][0] == pytest.approx(start)


def test_more_checkpoints_than_it_takes_are_refused(setting):
    source = lsa.load(optimizer="sgd", project="paths")
    with pytest.raises(InputError, match="takes 1 to 3 checkpoint"):
        measure.measure("surface", *[source] * 4)


@pytest.mark.full
def test_a_killed_surface_goes_on_where_it_stopped(trained, workplace):
    words = f"surface --project tiny --checkpoint {trained.run_id} --points 51".split()
    command = [sys.executable, "-m", "lsa", *words]
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    with started(command, env=environment) as process:
        deadline = time.monotonic() + 200
        while len(kept(workplace)) < 50 and process.poll() is None:
            assert time.monotonic() < deadline, "no point of the plane was measured"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    (before,) = (workplace / partial.SCRATCH).iterdir()
    memory = partial.Numbers(before).data
    assert 50 <= len(memory) < 51**2
    done = measure.measure("surface", lsa.load(trained.run_id), points=51)
    assert not before.exists()  # it was of this very step, and has served
    grid = np.load(files(done.run_id) / "surface.npz")
    for key, point in memory.items():
        _, j, i = key.split()
        assert grid["loss"][int(j), int(i)] == point[0]


def kept(workplace: Path) -> list[str]:
    """Lines of the partial results so far."""
    return [
        line
        for file in (workplace / partial.SCRATCH).glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]

"""Bad input of every kind gets one line; a fault of the machine leaves the store whole.

The rows of `docs/reliability.md` come of the same functions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults import checkpoints, disk, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lsa
from lsa import probe, project
from lsa.cli import app
from lsa.runtime.errors import InputError
from lsa.tracking import store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
documents = st.recursive(
    scalars,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(scalars, inside, max_size=4),
    max_leaves=12,
)
places = st.sampled_from(list(inputs.places(inputs.BASE)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=places, value=documents)
def test_anything_at_any_place_of_a_project_is_taken_or_refused_in_one_line(
    tmp_path_factory, place, value
):
    content = copy.deepcopy(inputs.replaced(place, value))
    file = tmp_path_factory.mktemp("project") / "p.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    inputs.refusal(file)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_in_place_of_a_project_is_refused_in_one_line(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("project") / "p.yaml"
    file.write_text(text, encoding="utf-8")
    assert inputs.refusal(file)


def test_malformed_projects_and_options_are_refused(tmp_path):
    refused, _ = inputs.projects(tmp_path, every=4)
    assert refused > 200
    assert inputs.options() > 200


def test_what_yaml_reads_as_something_else_is_refused_with_its_line(tmp_path):
    assert inputs.texts(tmp_path) > 20


def test_a_dry_run_tells_of_wrong_options(workplace, capsys):
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text().replace("lr: 0.01", "lr: .nan"))
    assert app.run(["study", "tiny", "--dry-run"]) == 2
    assert "lr=nan must be a finite number" in capsys.readouterr().err


def test_malformed_command_lines_get_one_line_and_exit_code_2(workplace):
    assert inputs.commands() > 30


@pytest.mark.full
def test_every_malformed_project_and_checkpoint(tmp_path):
    rows = [*inputs.rows(tmp_path), *checkpoints.rows(tmp_path / "checkpoints")]
    assert {row.lost for row in rows} == {"nothing"}


@pytest.mark.full
def test_where_no_file_may_grow_the_store_stays_whole(tmp_path):
    assert len(disk.too_large(tmp_path)) == len(disk.LIMITS)


@pytest.mark.full
@pytest.mark.skipif(not disk.mountable(), reason="only root can mount a small disk")
@pytest.mark.parametrize("left", disk.FREE[::4])
def test_a_full_disk_leaves_the_store_whole(tmp_path, left):
    assert len(disk.full(tmp_path, [left])) == 2


@pytest.mark.full
@pytest.mark.skipif(not disk.mountable(), reason="only root can mount a small disk")
def test_a_read_only_disk_leaves_the_store_whole(tmp_path):
    assert len(disk.read_only(tmp_path)) == 2


def tracked(source: lsa.Checkpoint, **options: Any) -> Any:
    return lsa.measure("lanczos", source, **options)


def called(source: lsa.Checkpoint, **options: Any) -> Any:
    return probe.find("lanczos")(landscape=source.landscape, theta=source.theta, **options)


PYTHON: dict[str, Callable[[lsa.Checkpoint], Any]] = {
    "a number as a checkpoint": lambda c: lsa.load(42),  # pyright: ignore
    "a list as a checkpoint": lambda c: lsa.load(["x"]),  # pyright: ignore
    "a path that is no checkpoint": lambda c: lsa.load(Path("nope")),
    "a number as a project": lambda c: lsa.load(project=42, optimizer="sgd"),  # pyright: ignore
    "a number as an optimizer": lambda c: lsa.load(project="tiny", optimizer=3),  # pyright: ignore
    **{
        f"seed={seed!r} of a checkpoint": lambda c, seed=seed: lsa.load(
            project="tiny", optimizer="sgd", seed=seed
        )
        for seed in ("0", 1.5, True, -1, 2**64)
    },
    **{
        f"samples={samples!r}": lambda c, samples=samples: lsa.load(c.run_id, samples=samples)
        for samples in (-1, 0, "x", 1.5, True)
    },
    "a number as a device": lambda c: lsa.load(c.run_id, device=3),  # pyright: ignore
    "no device": lambda c: lsa.load(c.run_id, device="abacus"),
    "a number as trust": lambda c: lsa.load(c.run_id, trust=3),  # pyright: ignore
    "numbers as trust": lambda c: lsa.load(c.run_id, trust=[3]),  # pyright: ignore
    "a number as a probe": lambda c: lsa.measure(42, c),  # pyright: ignore
    "a landscape as a checkpoint": lambda c: lsa.measure("lanczos", c.landscape),  # pyright: ignore
    "no checkpoint": lambda c: lsa.measure("lanczos"),
    **{
        f"rng_seed={seed!r}, {how.__name__}": lambda c, how=how, seed=seed: how(c, rng_seed=seed)
        for seed in ("0", None, 1.5, True, -1)
        for how in (tracked, called)
    },
    **{
        f"{name}={value!r}, {how.__name__}": lambda c, how=how, name=name, value=value: how(
            c, **{name: value}
        )
        for name, value in (("k", True), ("k", "x"), ("k", 2**70), ("tol", math.inf), ("tol", True))
        for how in (tracked, called)
    },
    "a number as a study": lambda c: lsa.study(42).__enter__(),  # pyright: ignore
    "a study of nothing": lambda c: lsa.study(Path("nope.yaml")).__enter__(),
    **{
        f"workers={n!r}": lambda c, n=n: lsa.study("tiny", workers=n).__enter__()
        for n in ("2", 0, True, 1.5)
    },
    "a number as a step": lambda c: lsa.step(42, project="tiny"),  # pyright: ignore
    "a training of a number": lambda c: lsa.step("train", project="tiny", optimizer=3),
    "a training with a seed of text": lambda c: lsa.step(
        "train", project="tiny", optimizer="sgd", seed="0"
    ),
    "a checkpoint as a step": lambda c: lsa.step("lanczos", c, project="tiny"),  # pyright: ignore
    "an option of True": lambda c: project.load("tiny").recipe("sgd", epochs=True),
}


def test_python_refuses_wrong_arguments_in_one_line_before_a_run_begins(trained):
    source = lsa.load(trained.run_id, device="cpu")
    before = len(store.client().search_runs(store.experiments()))
    for what, call in PYTHON.items():
        with pytest.raises(InputError) as caught:
            call(source)
        assert str(caught.value).isprintable(), what
    assert len(store.client().search_runs(store.experiments())) == before


def test_a_path_is_welcome_where_text_is(trained, workplace):
    file = Path("projects", "tiny.yaml")
    found = lsa.load(project=file, optimizer="sgd", device=torch.device("cpu"), trust="abc,de")
    assert found.run_id == trained.run_id and {"abc", "de"} <= set(found.trusted)
    with lsa.study(file) as running:
        assert running.setting.name == "tiny"

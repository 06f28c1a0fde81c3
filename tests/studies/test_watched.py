"""`train: {watch: …}`: the same training, with more in its run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import mlflow
import pytest

from lsa import project
from lsa.studies import train
from lsa.training import train as training
from lsa.watching.watch import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
WATCH = {"every": 3, "samples": 64, "budget": None, "measure": list(KINDS)}


def recipe(optimizer: str, watch: dict | None):
    found = project.load("tiny").recipe(optimizer)
    budget = found.train.model_dump() | {"watch": watch}
    return type(found).model_validate(found.model_dump() | {"train": budget})


def history(run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = mlflow.MlflowClient()
    names = client.get_run(run_id).data.metrics
    return {
        n: sorted((m.step, m.value) for m in client.get_metric_history(run_id, n)) for n in names
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_watched_training_is_the_same_and_its_run_has_the_numbers(
    workplace: Path, optimizer: str
):
    plain = history(train.train(recipe(optimizer, None)).run_id)
    watched = history(train.train(recipe(optimizer, WATCH)).run_id)
    assert {n: v for n, v in watched.items() if not n.startswith("watch/")}.keys() == plain.keys()
    for name, values in plain.items():
        if "seconds" not in name:
            assert watched[name] == values, name
    assert [step for step, _ in watched["watch/directional_sharpness"]] == [3, 6]
    assert [step for step, _ in watched["watch/threshold_ratio"]] == [3, 6]
    assert {"watch/noise_trace", "watch/gradient_norm", "watch/loss"} <= watched.keys()


def test_an_interrupted_training_logs_all_its_steps(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = history(train.train(recipe("sgd", WATCH)).run_id)
    real = training.train

    def cut(*arguments, **options):
        with contextlib.closing(real(*arguments, **options)) as epochs:
            yield next(epochs)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.training, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe("sgd", WATCH))
    monkeypatch.setattr(train.training, "train", real)
    resumed = history(train.train(recipe("sgd", WATCH)).run_id)
    for name in ("watch/gradient_norm", "watch/noise_trace", "watch/threshold_ratio"):
        assert {step for step, _ in whole[name]} <= {step for step, _ in resumed[name]}
    for step, value in whole["watch/directional_sharpness"]:
        assert dict(resumed["watch/directional_sharpness"])[step] == value


def test_the_schema_knows_what_can_be_measured():
    found = project.sections.Watching.model_fields["measure"].annotation
    assert set(found.__args__[0].__args__) == set(KINDS)

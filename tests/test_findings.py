"""Findings rebuilt from a real store, over seeds whose values are known."""

from __future__ import annotations

import mlflow
import pytest

from lsa import cli, project
from lsa.errors import InputError
from lsa.findings import findings
from lsa.measurements import measured

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def log(step: str, optimizer: str, seed: int, metrics: dict[str, float], **params: object) -> None:
    """A finished run as `lsa` leaves it."""
    tags = {"lsa.step": step, "project": "tiny", "optimizer": optimizer, "seed": str(seed)}
    with mlflow.start_run(tags=tags):
        mlflow.log_metrics(metrics)
        mlflow.log_params({"optimizer": optimizer, "seed": seed, **params})


@pytest.fixture
def seven_seeds(workplace):
    """sgd's λ_max is twice adamw's at every seed; the accuracies are equal on average."""
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text().replace("seeds: [0]", "seeds: [0, 1, 2, 3, 4, 5, 6]"))
    for seed in range(7):
        for optimizer, factor in (("sgd", 2.0), ("adamw", 1.0)):
            accuracy = 0.9 + 0.01 * (-1) ** seed * (factor - 1.5)
            log("train", optimizer, seed, {"final/val_accuracy": accuracy, "final/train_loss": 0.1})
            log("lanczos", optimizer, seed, {"lanczos/lambda_max": factor * (5 + seed)}, k=2)
    return project.load("tiny")


def test_what_every_seed_shows_is_established_and_chance_is_not(seven_seeds, capsys):
    found = {f.metric: f.comparison for f in findings(measured(seven_seeds))}
    sharpness, accuracy = found["lanczos/lambda_max"], found["final/val_accuracy"]
    assert sharpness.established and sharpness.effect == pytest.approx(2)
    assert (sharpness.a, sharpness.b, sharpness.seeds) == ("sgd", "adamw", 7)
    assert accuracy.scale == "difference" and not accuracy.established
    assert cli.run(["compare", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "sgd/adamw = 2" in out and "the project has 7" in out


def test_the_newest_measurement_of_a_checkpoint_counts(seven_seeds):
    for seed in range(7):
        log("lanczos", "sgd", seed, {"lanczos/lambda_max": 5.0 + seed}, k=2)
    found = {f.metric: f.comparison for f in findings(measured(seven_seeds))}
    assert found["lanczos/lambda_max"].effect == pytest.approx(1)


def test_measurements_with_other_options_are_not_compared(seven_seeds):
    log("lanczos", "sgd", 0, {"lanczos/lambda_max": 10.0}, k=5)
    with pytest.raises(InputError, match="lanczos was measured with k=5 and with k=2"):
        findings(measured(seven_seeds))


def test_nothing_measured_is_said(workplace, capsys):
    assert cli.run(["compare", "tiny"]) == 2
    assert "nothing of project tiny is measured" in capsys.readouterr().err

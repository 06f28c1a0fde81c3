"""Checkpoints of other code by commands, in real processes: the numbers of the interface."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from servers import environment
from theirs import NAME, study
from torch import nn

import lsa
from lsa.landscape import flatten

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]

ROOT = Path(__file__).parents[2]
LSA = [sys.executable, "-m", "lsa"]
MLFLOW = [str(Path(sys.executable).with_name("mlflow")), "run", str(ROOT), "--env-manager", "local"]


def trained(parts: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = parts.line()
    (x, y), _ = parts.waves()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture
def adopted(parts: Any, workplace: Path) -> Callable[[int], tuple[nn.Module, str]]:
    """Trains by their loop, saves, adopts by the shell: the network, and its run."""

    def adopt(seed: int) -> tuple[nn.Module, str]:
        model = trained(parts, seed)
        torch.save(model.state_dict(), workplace / f"{seed}.pt")
        options = {
            "factory": f"{NAME}:line", "data": f"{NAME}:waves", "loss": "MSELoss",
            "project": "tiny", "seed": str(seed), "samples": "all",
        }  # fmt: skip
        named = [word for name, value in options.items() for word in (f"--{name}", value)]
        said = done([*LSA, "adopt", f"{seed}.pt", *named], workplace)
        found = re.search(r"\brun +(\w{32})", said)
        assert found, said
        return model, found[1]

    return adopt


def done(command: list[str], folder: Path) -> str:
    env = environment(
        PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]),
        MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
    )
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def landscape(parts: Any, model: nn.Module) -> lsa.Landscape:
    return lsa.Landscape(model, *parts.waves()[0], nn.MSELoss())


def tracked(probe: str) -> list[Mapping[str, float]]:
    """The metrics of the finished runs of a probe."""
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`lsa.step` = '{probe}' and attributes.status = 'FINISHED'",
        output_format="list",
    )
    return [run.data.metrics for run in runs]


def same(found: Mapping[str, float], result: lsa.Result, probe: str, *but: str) -> None:
    """Every number of the interface is in the run, to what another random start leaves."""
    wanted = {n: m for n, m in result.metrics.items() if n not in (*but, "products")}
    assert len(wanted) > 3
    for name, metric in wanted.items():
        if "residual" in name or "orthogonality" in name:  # of rounding
            continue
        assert found[f"{probe}/{name}"] == pytest.approx(metric.value, rel=2e-3, abs=1e-5), name


def test_mlflow_run_measures_an_adopted_run(parts, adopted, workplace):
    model, run = adopted(0)
    words = {"checkpoint": run, "trust": NAME, "k": "2", "density_probes": "0"}
    chosen = [word for name, value in words.items() for word in ("-P", f"{name}={value}")]
    said = done([*MLFLOW, "-e", "lanczos", *chosen], workplace)
    (found,) = tracked("lanczos")
    same(found, lsa.lanczos(landscape(parts, model), k=2, density_probes=0), "lanczos")
    assert re.search(rf"lanczos/lambda_max +{found['lanczos/lambda_max']:.6g} ± ", said)


def test_layers_of_an_adopted_run_by_a_command(parts, adopted, workplace):
    model, run = adopted(0)
    said = done([*LSA, "layers", "--checkpoint", run, "--trust", NAME], workplace)
    (found,) = tracked("layers")
    same(found, lsa.layers(landscape(parts, model)), "layers", "trace")
    assert "blocks from 1 on: 0, 2" in said


def test_two_adopted_runs_are_joined_by_a_command(parts, adopted, workplace):
    (model, a), (other, b) = adopted(0), adopted(1)
    pair = ["--checkpoint", a, "--checkpoint-b", b, "--points", "9", "--trust", NAME]
    done([*LSA, "interpolation", *pair], workplace)
    (found,) = tracked("interpolation")
    train, validation = (lsa.Landscape(model, *split, nn.MSELoss()) for split in parts.waves())
    ends = flatten(model), flatten(other)
    same(found, lsa.interpolation(train, validation, *ends, points=9), "interpolation")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the nine points from −0.5 to 1.5
    losses = [train.loss(ends[0].lerp(ends[1], share)) for share in shares]
    straight = [losses[0] + share * (losses[-1] - losses[0]) for share in shares]
    barrier = max(loss - line for loss, line in zip(losses, straight, strict=True))
    assert found["interpolation/barrier"] == pytest.approx(barrier, rel=1e-3, abs=1e-6)


def test_a_study_of_adopted_runs_by_a_command(parts, adopted, workplace):
    (model, a), (other, b) = adopted(0), adopted(1)
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(study(a, b, seeds=[0, 1]))
    done([*LSA, "study", "tiny", "--workers", "1"], workplace)
    found = sorted(m["lanczos/lambda_max"] for m in tracked("lanczos"))
    assert len(found) == 4 and len(tracked("train")) == 4  # theirs twice, and sgd of two seeds
    for network in (model, other):
        expected = lsa.lanczos(landscape(parts, network), k=1, density_probes=0)["lambda_max"]
        assert any(f == pytest.approx(expected.value, rel=1e-4) for f in found)
    assert len(tracked("interpolation")) >= 2

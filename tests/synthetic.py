"""A finished study that nobody computed: known numbers, logged as `lsa` logs them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from lsa import project
from lsa.probe import Curve, Metric, Result, find
from lsa.project import Project
from lsa.tracking import spool, store
from lsa.tracking.run import Run

EPOCHS = 12
# Decay of the train loss per epoch, λ_max at the loss 1, final accuracy and noise λ_C, of each.
OPTIMIZERS = {
    "sgd": (0.20, 40.0, 0.93, 3.0),
    "heavy": (0.32, 20.0, 0.95, 1.0),
    "adamw": (0.45, 60.0, 0.97, 2.0),
}


def curvature(loss: np.ndarray | float, scale: float) -> Any:
    """λ(L) of the synthetic trainings: a power law."""
    return scale * np.asarray(loss) ** 0.5


class Store:
    """Writes runs of one project."""

    def __init__(self, project: str) -> None:
        client = store.client()
        found = client.get_experiment_by_name(project)
        self.project = project
        self.experiment = found.experiment_id if found else client.create_experiment(project)
        self.trained: dict[tuple[str, int], str] = {}  # optimizer, seed -> its training run

    def log(
        self,
        step: str,
        names: Sequence[str],
        seed: int,
        metrics: Mapping[str, float],
        *,
        history: Mapping[str, Sequence[float]] | None = None,
        artifact: tuple[str, Any] | None = None,
        **params: Any,
    ) -> str:
        """One finished run; its id."""
        tags = {
            "lsa.step": step,
            "project": self.project,
            "optimizer": names[0],
            "seed": str(seed),
            "lsa.git.commit": "0123456789abcdef",
            "lsa.version.lsa": "1.0",
            "lsa.version.torch": "2.0",
            "lsa.device": "cpu",
            "lsa.threads": "1",
        }
        if step != "train":
            params["checkpoint"] = self.trained[names[0], seed]
        if len(names) > 1:
            params["checkpoint_b"] = self.trained[names[1], seed]
            tags["lsa.input.b"] = "m-b"
            params |= {"optimizer_b": names[1], "seed_b": seed}
        with mlflow.start_run(experiment_id=self.experiment, tags=tags) as run:
            content = spool.Content("", "", "", run_id=run.info.run_id)
            opened = Run(spool.begin(None, content))
            opened.metrics(metrics)
            opened.params({"optimizer": names[0], "seed": seed, **params})
            for name, values in (history or {}).items():
                opened.curve(name, np.asarray(values))
            if artifact:
                opened.json(artifact[1], artifact[0])
            opened.send()
            opened.entry.drop()
        return run.info.run_id

    def probe(self, step: str, names: Sequence[str], seed: int, result: Result) -> None:
        """A run of a probe, with its result as an artifact."""
        metrics = {}
        for key, metric in result.metrics.items():
            metrics[f"{step}/{key}"] = metric.value
            metrics |= {f"{step}/{key}_se_{s}": e for s, e in metric.errors.items()}
        stored = (f"{step}.json", result.to_dict())
        self.log(step, names, seed, metrics, artifact=stored, n_samples=512)


def studied(folder: Path) -> Project:
    """A project `made` in a workplace, of two seeds, with every step of its study."""
    (folder / "projects" / "made.yaml").write_text(PROJECT.replace("SEEDS", "[0, 1]"))
    study("made", [0, 1])
    return project.load("made")


def study(
    project: str,
    seeds: Sequence[int],
    *,
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
    steps: Sequence[str] = (
        "lanczos", "trajectory", "sgd_noise", "perturbation", "intrinsic_dim", "interpolation",
        "auto_neb",
    ),
) -> None:  # fmt: skip
    """Log every step of a study of these optimizers."""
    store = Store(project)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        shift = rng.normal(0, 0.1)  # what the optimizers of one seed have in common
        for name in optimizers:
            _checkpoint(store, name, seed, shift, rng, steps)
        for pair in combinations(optimizers, 2):
            _pair(store, pair, seed, rng, steps)


def _checkpoint(
    store: Store, name: str, seed: int, shift: float, rng: Any, steps: Sequence[str]
) -> None:
    decay, scale, accuracy, noise = OPTIMIZERS[name]
    epochs = np.arange(1, EPOCHS + 1)
    losses = 2.3 * np.exp(-decay * epochs + shift + rng.normal(0, 0.02))
    accuracies = accuracy * (1 - np.exp(-2 * decay * epochs)) + rng.normal(0, 0.002)
    sharpness = curvature(losses, scale) * math.exp(rng.normal(0, 0.05))
    final = {
        "final/val_accuracy": float(accuracies[-1]),
        "final/val_accuracy_se_data": 0.01,
        "final/train_loss": float(losses[-1]),
    }
    history = {"train/loss": losses, "val/accuracy": accuracies}
    budget: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 64}
    store.trained[name, seed] = store.log("train", [name], seed, final, history=history, **budget)
    results = {
        "lanczos": _spectrum(float(sharpness[-1]), rng),
        "sgd_noise": _noise(float(sharpness[-1]), noise * math.exp(rng.normal(0, 0.05))),
        "perturbation": _along(rng),
        "intrinsic_dim": _dimension(accuracy, seed),
    }
    for step, result in results.items():
        if step in steps:
            store.probe(step, [name], seed, result)
    if "trajectory" in steps:
        stored = {
            "probe": "lanczos",
            "epochs": epochs.tolist(),
            "train_loss": losses.tolist(),
            "val_accuracy": accuracies.tolist(),
            "metrics": {"lambda_max": {"unit": "loss", "value": sharpness.tolist()}},
            "threshold": None if name == "adamw" else {"value": 50.0, "formula": "2/η"},
        }
        store.log("trajectory.lanczos", [name], seed, {}, artifact=("trajectory.json", stored))


def _spectrum(top: float, rng: Any) -> Result:
    x = np.linspace(-1.05, 1.05, 211)
    density = np.exp(-0.5 * (x / 0.03) ** 2) + 1e-3 * np.exp(-0.5 * ((x - 0.9) / 0.03) ** 2)
    bottom = -0.5 * math.exp(rng.normal(0, 0.1))
    errors = {"data": 0.05}
    metrics = {
        "lambda_max": Metric(top, "loss", {"data": 0.02 * top}),
        "lambda_max_residual": Metric(1e-3),
        "lambda_min": Metric(bottom, "loss", errors),
        "lambda_min_residual": Metric(1e-3),
        "condition_number": Metric(abs(top / bottom)),
        "trace": Metric(10 * top, "loss", {"probes": 0.2 * top}),
        "n_outliers": Metric(9),
    }
    curve = Curve(x, density * math.exp(rng.normal(0, 0.2)), "relative_eigenvalue")
    return Result(metrics, {"density": curve})


def _noise(top: float, noise: float) -> Result:
    metrics = {
        "lambda_h": Metric(top, "loss"),
        "lambda_c": Metric(noise, "loss²"),
        "noise_ratio": Metric(noise / top, "loss"),
    }
    index = np.arange(1.0, 6)
    return Result(metrics, {"hessian_eigenvalue": Curve(index, top / index, "index")})


def _along(rng: Any) -> Result:
    x = np.linspace(-1, 1, 41)
    y = x**2 * math.exp(rng.normal(0, 0.2))
    metrics = {"curvature_fit": Metric(1.0), "asymmetry": Metric(0.0), "loss_rise": Metric(1.0)}
    return Result(metrics, {"loss_along_top": Curve(x, y, "relative_epsilon")})


def _dimension(accuracy: float, seed: int) -> Result:
    d = np.array([8.0, 32, 128, 512])
    y = 0.95 - 0.8 * np.exp(-d / (60 + 5 * seed))
    found = math.inf if seed == 3 else 200.0 + 10 * seed
    metrics = {
        "d90": Metric(found),
        "d90_low": Metric(0.8 * found),
        "d90_high": Metric(1.2 * found),
        "threshold": Metric(0.9 * accuracy),
    }
    return Result(metrics, {"accuracy": Curve(d, y, "d")})


def _pair(store: Store, pair: tuple[str, str], seed: int, rng: Any, steps: Sequence[str]) -> None:
    height = math.exp(rng.normal(0, 0.1))
    alpha = np.linspace(-0.5, 1.5, 61)
    line = 0.05 + 4 * np.clip(alpha * (1 - alpha), 0, None) * height + 2 * (
        np.clip(-alpha, 0, None) + np.clip(alpha - 1, 0, None)
    )  # fmt: skip
    fraction = np.linspace(0, 1, 41)
    path = 0.05 + 0.2 * np.sin(np.pi * fraction) ** 2 * height
    if "interpolation" in steps:
        metrics = {
            "barrier": Metric(height, "loss", {"data": 0.05}),
            "alpha_min": Metric(0.0, errors={"data": 0.0, "grid": 0.01}),
            "barrier_aligned": Metric(0.4 * height, "loss", {"data": 0.05}),
        }
        curves = {
            "train_loss": Curve(alpha, line, "alpha"),
            "train_loss_aligned": Curve(alpha, 0.05 + 0.4 * (line - 0.05), "alpha"),
        }
        store.probe("interpolation", pair, seed, Result(metrics, curves))
    if "auto_neb" in steps:
        metrics = {
            "path_loss": Metric(0.05 + 0.2 * height, "loss", {"data": 0.01}),
            "barrier": Metric(0.2 * height, "loss", {"data": 0.01}),
            "log_classes": Metric(math.log(10), "loss"),
            "bound_margin": Metric(2.0, "loss"),
            "linear_max": Metric(1.0 + height, "loss"),
        }
        store.probe(
            "auto_neb",
            pair,
            seed,
            Result(metrics, {"train_loss": Curve(fraction, path, "fraction")}),
        )


PROJECT = """
dataset: {name: digits}
model: {name: mlp, hidden: [16]}
train: {epochs: 12, batch_size: 64}
optimizers:
  sgd: {name: SGD, lr: 0.05}
  heavy: {name: SGD, lr: 0.01, momentum: 0.9}
  adamw: {name: AdamW, lr: 0.002}
seeds: SEEDS
probes: {lanczos: {}, sgd_noise: {}, perturbation: {}, intrinsic_dim: {}}
pairs: {interpolation: {}, auto_neb: {}}
"""
__all__ = ["PROJECT", "Store", "curvature", "find", "studied", "study"]

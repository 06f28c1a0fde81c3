"""A store of many runs that nobody computed, written straight into SQLite's tables."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lsa.tracking import store

STEPS = ("lanczos", "sgd_noise", "perturbation", "sharpness")
OPTIMIZERS = ("sgd", "heavy", "adamw", "lion", "muon")
START = 1_700_000_000_000  # milliseconds since 1970


class Tables:
    """Rows by table, inserted at once."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: str, **values: Any) -> None:
        """One row."""
        self.rows.setdefault(table, []).append(values)

    def named(self, table: str, pairs: Mapping[str, Any], key: str, value: str, **of: Any) -> None:
        """One row for each name and its value."""
        for name, one in pairs.items():
            self.add(table, **{key: name, value: str(one)}, **of)

    def write(self, file: Path) -> None:
        """Insert all."""
        with sqlite3.connect(file) as database:
            for table, rows in self.rows.items():
                columns = ", ".join(rows[0])
                places = ", ".join("?" * len(rows[0]))
                command = f"insert into {table} ({columns}) values ({places})"
                database.executemany(command, [tuple(row.values()) for row in rows])


def fill(
    file: Path, *, projects: Iterable[str], seeds: int, trainings: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """Every optimizer × seed of these projects: a training, its registered checkpoint and probes.

    Args:
        file: The SQLite store, which exists.
        projects: Their names.
        seeds: Of each.
        trainings: Parameters of a training, by optimizer; what `lsa train` logs.

    Returns:
        The number of runs and of versions.
    """
    tables, runs, versions = Tables(), 0, 0
    for project in projects:
        experiment = store.client().create_experiment(project)
        for optimizer in OPTIMIZERS:
            name = f"{project}.{optimizer}"
            tables.add("registered_models", name=name, creation_time=START)
            for seed in range(seeds):
                runs += 1 + len(STEPS)
                versions += 1
                params = (trainings or {}).get(optimizer, {})
                _training(tables, project, int(experiment), optimizer, seed, params)
    tables.write(file)
    return runs, versions


def _training(
    tables: Tables, project: str, experiment: int, optimizer: str, seed: int, params: Any
) -> None:
    name = f"{project}.{optimizer}"
    run = _id(project, optimizer, seed, "train")
    model = f"m-{run}"
    tags = {"project": project, "optimizer": optimizer, "seed": seed}
    link = json.dumps([{"name": name, "version": str(seed + 1)}])
    given = {"optimizer": optimizer, "seed": seed, "batch_size": 64, **params}
    metrics = {"final/val_accuracy": 0.9 + seed / 1000, "final/train_loss": 0.1}
    made = {"lsa.checkpoint": f"models:/{name}/{seed + 1}", "lsa.model_id": model}
    _run(tables, experiment, run, "train", tags | made, given, metrics)
    tables.add(
        "logged_models",
        model_id=model,
        experiment_id=experiment,
        name=f"{optimizer}-s{seed}",
        artifact_location="/nowhere",
        creation_timestamp_ms=START + seed,
        last_updated_timestamp_ms=START + seed,
        status=2,
        lifecycle_stage="active",
        source_run_id=run,
    )
    of = {"model_id": model, "experiment_id": experiment}
    kept = tags | {"epoch": 12, "lsa.key": f"key-{run}", "mlflow.modelVersions": link}
    tables.named("logged_model_tags", kept, "tag_key", "tag_value", **of)
    tables.add(
        "model_versions",
        name=name,
        version=seed + 1,
        creation_time=START + seed,
        last_updated_time=START + seed,
        current_stage="None",
        source=f"models:/{model}",
        run_id=run,
        status="READY",
    )
    of = {"name": name, "version": seed + 1}
    tables.named("model_version_tags", tags | {"epoch": 12}, "key", "value", **of)
    for step in STEPS:
        measured = _id(project, optimizer, seed, step)
        given = {"optimizer": optimizer, "seed": seed, "checkpoint": run, "n_samples": 512}
        numbers = {f"{step}/n{j}": float(j) for j in range(12)}
        _run(tables, experiment, measured, step, tags, given, numbers)
        for metric, value in list(numbers.items())[:3]:
            tables.add(
                "logged_model_metrics",
                model_id=model,
                metric_name=metric,
                metric_timestamp_ms=START,
                metric_step=0,
                metric_value=value,
                experiment_id=experiment,
                run_id=measured,
            )


def _id(*of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:32]


def _run(
    tables: Tables, experiment: int, run: str, step: str, tags: Any, params: Any, metrics: Any
) -> None:
    tables.add(
        "runs",
        run_uuid=run,
        name=f"{step}-{tags['optimizer']}-s{tags['seed']}",
        user_id="nobody",
        status="FINISHED",
        start_time=START + tags["seed"],
        end_time=START + 1000,
        lifecycle_stage="active",
        artifact_uri=f"/nowhere/{run}",
        experiment_id=experiment,
    )
    provenance = {
        "lsa.step": step, "lsa.key": f"{run}-{step}", "lsa.host": "h", "lsa.process": "1@1",
        "lsa.git.commit": "0" * 40, "lsa.version.torch": "2", "lsa.version.lsa": "1",
        "lsa.device": "cpu", "lsa.threads": "1", "mlflow.user": "nobody",
    }  # fmt: skip
    tables.named("tags", provenance | tags, "key", "value", run_uuid=run)
    tables.named("params", params, "key", "value", run_uuid=run)
    for name, value in metrics.items():
        same = {"key": name, "value": value, "timestamp": START, "step": 0, "is_nan": 0}
        tables.add("latest_metrics", **same, run_uuid=run)
        tables.add("metrics", **same, run_uuid=run)

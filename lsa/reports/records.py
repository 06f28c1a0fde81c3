"""Runs, checkpoints and probes as documents: what the commands that show them print."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, get_args

import pydantic

from lsa import probe, project
from lsa.probe import Probe, outline
from lsa.runtime.documents import json_number, whole_number
from lsa.runtime.errors import InputError
from lsa.tracking import registered, runs
from lsa.tracking.numbers import NOTE, numbers
from lsa.tracking.runs import Done

PICTURES = (".png", ".html")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class _Unit(pydantic.BaseModel):
    unit: str = ""


class _Units(pydantic.BaseModel):
    """A probe's JSON artifact, as far as the units of its numbers go."""

    metrics: dict[str, _Unit] = {}


def find(
    reference: str | None = None,
    *,
    name: str | None = None,
    optimizer: str | None = None,
    seed: int | None = None,
    step: str | None = None,
) -> Done:
    """The run meant.

    Args:
        reference: Run ID or the beginning of one, or the address of a checkpoint: its training.
        name: Instead of a reference: the project, …
        optimizer: … the optimizer, …
        seed: … and the seed of a checkpoint's training.
        step: Instead of a training: the newest run of this probe on its checkpoint.

    Raises:
        InputError: There is no such run, or several.
    """
    if not reference and not optimizer:
        raise InputError("no run is named; give a run ID or its beginning, or optimizer=…")
    if reference and not optimizer and not reference.startswith(("models:/", "runs:/")):
        named = runs.by_prefix(reference)
    else:
        address, _ = registered.locate(reference, name, optimizer, seed)
        named = runs.read(registered.training(address))
    if step is None:
        return named
    command = probe.find(step.removeprefix(project.TRAJECTORY)).name
    run = runs.newest_on(named.run_id, step)
    if run is None:
        raise InputError(
            f"no run of {step} measured the checkpoint of run {named.run_id}; make one with: "
            f"lsa {command} --checkpoint {named.run_id}"
        )
    return run


def run(done: Done) -> dict[str, Any]:
    """Everything about a run; its numbers with units and standard errors."""
    step = done.tags.get("lsa.step", "")
    try:
        files = runs.files(done.run_id)
    except runs.Broken:  # nothing can be read where it says that they are
        files = []
    units = _units(done.run_id, step, files)
    values = {**done.metrics, **runs.not_finite(done.tags)}
    return {
        "run": done.run_id,
        "name": done.name,
        "step": step,
        "status": done.status,
        "error": done.tags.get("lsa.error"),
        "started": _time(done.started),
        "seconds": done.seconds,
        "project": done.tags.get("project"),
        "optimizer": done.tags.get("optimizer"),
        "seed": whole_number(done.tags.get("seed", "")),
        "checkpoints": _checkpoints(done, step),
        "parameters": _parameters(done.params, step),
        "metrics": {
            name: {
                "value": json_number(metric.value),
                "unit": units.get(name.removeprefix(f"{step}/"), ""),
                "standard_errors": {k: json_number(error) for k, error in metric.errors.items()},
            }
            for name, metric in numbers(values, done.tags.get("lsa.curves", "").split()).items()
        },
        "notes": notes(done.tags),
        "figures": [f"{done.artifacts}/{file}" for file in files if file.endswith(PICTURES)],
        "artifacts": done.artifacts,
    }


def notes(tags: Mapping[str, str]) -> list[str]:
    """Notes of a run's probe, in their order."""
    numbered = {
        whole_number(k.removeprefix(NOTE)): v for k, v in tags.items() if k.startswith(NOTE)
    }
    return [numbered[number] for number in sorted(n for n in numbered if n is not None)]


def _time(milliseconds: int) -> str | None:
    """A time since 1970 as ISO 8601; None of one that no calendar has."""
    try:
        return (EPOCH + timedelta(milliseconds=milliseconds)).isoformat()
    except OverflowError:
        return None


def _units(run_id: str, step: str, files: Collection[str]) -> dict[str, str]:
    """Units of a probe's numbers, which its artifact knows."""
    file = f"{step.partition('.')[0]}.json"
    if file not in files:
        return {}
    try:
        stored = _Units.model_validate(runs.artifact(run_id, file))
    except (InputError, pydantic.ValidationError):  # what anybody may have written
        return {}
    return {name: metric.unit for name, metric in stored.metrics.items()}


def _checkpoints(done: Done, step: str) -> list[dict[str, str]]:
    """The checkpoint that a training registered, or those that a probe measured."""
    if step == "train":
        address = done.tags.get("lsa.checkpoint")
        return [{"address": address, "run": done.run_id}] if address else []
    names = ("checkpoint", "checkpoint_b", "checkpoint_c")
    ids = [done.params[name] for name in names if name in done.params]
    rows = []
    for model_id in ids:
        try:
            address = registered.resolve(model_id)
        except InputError:  # deleted since
            address = ""
        rows.append({"address": address, "run": model_id})
    return rows


def _parameters(params: Mapping[str, str], step: str) -> dict[str, Any]:
    """Name → value and default, which is None where there is none."""
    name = step.removeprefix(project.TRAJECTORY)
    declared = outline.read(name) if name in probe.modules() else None
    return {key: _parameter(declared, key, text) for key, text in params.items()}


def _parameter(declared: Probe | None, key: str, text: str) -> dict[str, Any]:
    if declared is None or key not in declared.options:
        return {"value": text, "default": None}
    value: Any = text
    with contextlib.suppress(InputError):  # of an option that has changed since
        value = project.resolve(declared, {key: text}, "run")[key]
    return {"value": value, "default": declared.options[key].default}


# --- lists ---------------------------------------------------------------------------------------


def checkpoints(name: str | None = None) -> list[dict[str, Any]]:
    """The registered checkpoints with the accuracy and headline numbers logged on them."""
    measured = ("final", *probe.modules())
    return [
        {
            "address": listed.address,
            "project": listed.project,
            "optimizer": listed.optimizer,
            "seed": listed.seed,
            "epoch": listed.epoch,
            "run": listed.run_id,
            "metrics": {
                key: {
                    "value": json_number(metric.value),
                    "standard_errors": {
                        k: json_number(error) for k, error in metric.errors.items()
                    },
                }
                for key, metric in numbers(listed.numbers).items()
                if key.partition("/")[0] in measured
            },
        }
        for listed in registered.listing(name)
    ]


def probes() -> list[dict[str, Any]]:
    """The probes with all that they declare."""
    return [_declaration(probe.find(name)) for name in probe.modules()]


def _declaration(declared: Probe) -> dict[str, Any]:
    return {
        "name": declared.name,
        "summary": declared.summary,
        "checkpoints": 1 + declared.pair,
        "most_checkpoints": declared.most,
        "along_training": declared.per_checkpoint,
        "headline": list(declared.headline),
        "options": {
            option.name: {
                "type": "choice" if get_args(option.type) else option.type.__name__,
                "choices": list(get_args(option.type)),
                "default": option.default,
                "help": option.help,
            }
            for option in declared.options.values()
        },
    }

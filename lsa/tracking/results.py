"""A result as a run of MLflow holds it, written and read back."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from mlflow.artifacts import download_artifacts
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from lsa.probe import Probe, Result
from lsa.runtime.errors import InputError, one_line
from lsa.tracking import runs, store
from lsa.tracking.checkpoint import Checkpoint
from lsa.tracking.numbers import NOTE, flat, numbers
from lsa.tracking.reading import reading
from lsa.tracking.run import Run

TRAIN = "train"
MOST = 5000  # characters of a description
FINAL = "final"  # prefix of a training's last evaluation, on its run and on its checkpoint
# What reading a file raises that somebody else has written, or that was cut.
DAMAGE = (AttributeError, KeyError, TypeError, ValueError, EOFError, BadZipFile)


def log(opened: Run, probe: Probe, result: Result, sources: Sequence[Checkpoint]) -> None:
    """Log a probe's result on its run, with names `<probe>/…`.

    Headline numbers and their errors are also logged on the checkpoint, where MLflow's UI shows
    them in its table of models. If it is the last checkpoint of a training, they are logged on the
    training's run as well. Of a pair, numbers in units of the loss are logged on both checkpoints;
    the largest of all pairs is kept.

    A curve over a count (layers, numbered eigenvalues) is logged as a metric with the count as its
    step, so that the UI draws it. Other curves are in the JSON artifact and in the figure.

    Args:
        opened: The run.
        probe: Its declaration.
        result: What it measured.
        sources: The checkpoints that it measured.
    """
    name = probe.name
    shown = {name + end for name in probe.headline for end in ("", "_low", "_high")}
    headline = {k: m for k, m in result.metrics.items() if k in shown}
    converged = {f"{name}/converged": float(result.converged)}
    opened.metrics(flat(name, headline) | converged, on=None if probe.pair else sources[0])
    opened.metrics(flat(name, {k: m for k, m in result.metrics.items() if k not in headline}))
    if probe.pair:
        heights = flat(name, {k: m for k, m in headline.items() if m.unit == "loss"})
        for source in sources[:2]:
            if source.is_last:
                opened.on_training(source, heights, pair=True)
    elif sources[0].is_last:
        opened.on_training(sources[0], flat(name, headline) | converged, pair=False)
    curves = {key: curve for key, curve in result.curves.items() if _counts(curve.x)}
    for key, curve in curves.items():
        opened.curve(f"{name}/{key}", curve.y, curve.x)
    opened.arrays(result.arrays)
    opened.json(result.to_dict(), f"{name}.json")
    describe(opened, probe.summary, result.notes, converged=result.converged)
    opened.tags({"lsa.curves": " ".join(f"{name}/{key}" for key in curves)})


def _counts(x: np.ndarray) -> bool:
    """Whether an axis has whole numbers alone, each once, as MLflow's steps are."""
    return bool((x == np.round(x)).all() and (x >= 0).all() and len(np.unique(x)) == len(x) > 1)


def describe(opened: Run, summary: str, notes: Sequence[str], *, converged: bool = True) -> None:
    """Store notes as tags, in their order, and what MLflow's UI shows as the description.

    Args:
        opened: The run.
        summary: Of what it measures.
        notes: Of the result.
        converged: Whether the result has.
    """
    said = [*([] if converged else ["Not converged."]), *notes]
    text = "\n".join([summary, "", *(f"- {note}" for note in said)]).strip()
    tags = {f"{NOTE}{i}": note for i, note in enumerate(notes)}
    opened.tags(tags | {MLFLOW_RUN_NOTE: text[:MOST]})


def read(run_id: str) -> Result:
    """The result of a finished training or probe, read back from its run.

    Raises:
        Broken: The run's artifact is not there, or damaged.
        InputError: The store does not answer.
    """
    done = runs.read(run_id)
    step = done.tags.get("lsa.step", "")
    if step == TRAIN:
        if not done.tags.get("lsa.checkpoint"):
            raise runs.Broken(f"run {run_id} holds no checkpoint; delete that run and train again")
        return trained(run_id, {**done.metrics, **runs.not_finite(done.tags)}, done.tags)
    content = runs.artifact(run_id, f"{step}.json", done.artifacts)
    try:
        stored = Result.from_dict(content, _arrays(run_id, content.get("arrays", {})))
    except InputError:
        raise
    except DAMAGE as error:
        raise runs.Broken(
            f"run {run_id} holds no result of {step} ({one_line(error)}); delete that run and "
            "measure again"
        ) from None
    return replace(stored, probe=step, run_id=run_id, reused=True)


def trained(run_id: str, values: Mapping[str, float], tags: Mapping[str, str]) -> Result:
    """The result of a finished training: its last evaluation.

    Args:
        run_id: Of the training.
        values: Metrics of its run.
        tags: Of its run.
    """
    metrics = {
        name.removeprefix(f"{FINAL}/"): metric
        for name, metric in numbers(values).items()
        if name.startswith(f"{FINAL}/")
    }
    address = tags.get("lsa.checkpoint", "")
    return Result(metrics, probe=TRAIN, run_id=run_id, checkpoint=address, reused=True)


def _arrays(run_id: str, names: Collection[str]) -> dict[str, np.ndarray]:
    """Arrays by the names under which `Run.arrays` has stored them.

    Raises:
        Broken: A file is not there, or a name leads out of the run's folder.
        InputError: The store does not answer.
    """
    for name in names:
        if "/" in name or "\\" in name or name.startswith("."):
            raise runs.Broken(f"run {run_id} names an array {name!r}; an array has no folder")
    files = {f"{name.partition('.')[0]}.np{'z' if '.' in name else 'y'}" for name in names}
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for file in sorted(files):
            stored = np.load(_fetched(run_id, file, scratch), allow_pickle=False)
            stem = Path(file).stem
            if isinstance(stored, np.ndarray):
                arrays[stem] = stored
            else:
                with stored:
                    arrays |= {f"{stem}.{key}": stored[key] for key in stored.files}
    return arrays


def _fetched(run_id: str, file: str, folder: str) -> str:
    """Path of a run's file, downloaded."""
    with reading(f"artifact {file} of run {run_id}"):
        return store.insist(
            lambda: download_artifacts(run_id=run_id, artifact_path=file, dst_path=folder)
        )

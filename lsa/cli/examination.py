"""What may be wrong with this machine and its store, each with what to do about it."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lsa.runtime import failures, provenance, variables
from lsa.runtime.errors import first_line, plain
from lsa.tracking import address, late, mlflow_plugin, runs, spool, store, stream

LOOKED_AT = 200  # runs whose files are looked for
MOVED = "if it was moved or copied, change the paths in its database as docs/moving.md says"
LITTLE, TOO_LITTLE = 2e9, 2e8  # bytes of a disk: a training's checkpoints, a single one


@dataclass(frozen=True)
class Checked:
    """One thing looked at."""

    what: str
    state: Literal["ok", "warning", "failure"]
    found: str
    advice: str = ""  # what to do, unless it is ok


def examine(*, end_stale: bool = False) -> Iterator[Checked]:
    """Look at everything, one after the other.

    Args:
        end_stale: End runs that are RUNNING although their process here is gone.
    """
    looks: dict[str, Callable[[], Checked]] = {
        "versions": _versions,
        "environment": _environment,
        "device": _device,
        "disk": _disk,
        "spool": _spool,
        "store": _store,
    }
    state = ""
    for what, look in looks.items():
        checked = _looked(what, look)
        yield checked
        state = checked.state
    # Artifacts and runs: of a store that is there and answers.
    if state != "failure" and not store.absent():  # the store, which comes last, answers
        yield _looked("artifacts", _artifacts)
        yield _looked("late", _late)
        yield _looked("runs", lambda: _runs(end_stale))


def _looked(what: str, look: Callable[[], Checked]) -> Checked:
    try:
        return look()
    except Exception as error:  # whatever it is: that is what the doctor was called for
        refused = failures.explained(error)
        found = refused or plain(f"{type(error).__name__}: {first_line(error)}")
        return Checked(what, "failure", found, "correct that and look again")


def _versions() -> Checked:
    versions = provenance.versions()
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if version == "not installed"]
    if missing:
        named = [provenance.DISTRIBUTIONS.get(name, name) for name in missing]
        return Checked("versions", "failure", text, f"pip install {' '.join(named)}")
    return Checked("versions", "ok", text)


def _environment() -> Checked:
    """The environment in which `mlflow run` of this project computes."""
    conda, uv = (shutil.which(name) for name in ("conda", "uv"))
    python = f"Python {platform.python_version()} in {sys.prefix}"
    if conda or mlflow_plugin.names_conda():
        return Checked("environment", "ok", f"{python}; `mlflow run` builds one with conda")
    managers = "--env-manager local" + (" or --env-manager uv" if uv else "")
    if mlflow_plugin.needs_stand_in(["mlflow", "run", "."]):
        return Checked(
            "environment", "ok", f"{python}; `mlflow run` takes it too, as there is no conda"
        )
    off = variables.off(variables.CONDA_STANDIN)
    why = f", and {variables.CONDA_STANDIN}=off" if off else ""
    advice = f"install conda, or call mlflow run with {managers}"
    return Checked("environment", "warning", f"{python}; there is no conda{why}", advice)


def _device() -> Checked:
    import torch

    memory = psutil.virtual_memory()
    free = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free"
    cpu = f"{psutil.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {free}"
    if not torch.cuda.is_available():
        return Checked("device", "ok", f"{cpu}; no GPU")
    names = []
    for i in range(torch.cuda.device_count()):
        ones = torch.ones(8, 8, device=f"cuda:{i}")
        if not bool((ones @ ones == 8).all()):
            advice = "leave it out with CUDA_VISIBLE_DEVICES"
            return Checked("device", "failure", f"cuda:{i} computes wrongly", advice)
        unused, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        names.append(f"cuda:{i} {name}, {unused / 1e9:.1f} of {total / 1e9:.1f} GB free")
    return Checked("device", "ok", "; ".join([cpu, *names]))


def _disk() -> Checked:
    """Space where lsa writes, and whether it may."""
    texts, worst = [], float("inf")
    folders = {"here": Path.cwd(), "for temporary files": Path(tempfile.gettempdir())}
    for name, folder in folders.items():
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        free = shutil.disk_usage(folder).free
        worst = min(worst, free)
        texts.append(f"{free / 1e9:.1f} GB free {name}")
    text = ", ".join(texts)
    if worst < LITTLE:
        state = "failure" if worst < TOO_LITTLE else "warning"
        return Checked("disk", state, text, "free some space; a checkpoint is lost without")
    return Checked("disk", "ok", text)


def _spool() -> Checked:
    """Results that were measured while the store was away, and entries that are damaged."""
    waiting, damaged = spool.entries(), spool.damaged()
    for path in waiting:
        spool.read(path)  # raises what is damaged
    waiting += stream.waiting()
    text = f"{len(waiting)} results in {spool.folder()} are measured and not logged"
    if damaged:
        names = ", ".join(path.name for path in damaged[:5]) + (", …" if len(damaged) > 5 else "")
        text += f"; {len(damaged)} damaged entries are kept in {damaged[0].parent}: {names}"
        advice = "measure their steps again and delete them" + ("; run lsa sync" if waiting else "")
        return Checked("spool", "warning", plain(text), advice)
    if waiting:
        return Checked("spool", "warning", text, "run lsa sync when the store answers")
    return Checked("spool", "ok", f"nothing waits in {spool.folder()}")


def _store() -> Checked:
    uri = store.uri()
    file = address.file_of(uri)
    if file and store.absent():
        with tempfile.TemporaryFile(dir=file.absolute().parent):
            pass
        return Checked("store", "ok", f"{store.where()} is not there yet; the first run makes it")
    client = store.client()
    (first, *_) = client.search_experiments(max_results=1)
    client.set_experiment_tag(first.experiment_id, "lsa.doctor", "can write")
    versions = client.search_model_versions(max_results=1)
    holds = "with" if versions else "without"
    text = f"{store.where()} answers and takes what is written, {holds} checkpoints"
    return Checked("store", "ok", text)


def _artifacts() -> Checked:
    """Whether the runs' files are where the database says, and that beside it.

    A database that was copied or moved still names the old folder: files are missing, or those of
    another store, to which new ones would go. Looked at are the folders of experiments, since a run
    may have no file.
    """
    file = address.file_of(store.uri())
    kept = [folder for run in runs.newest(LOOKED_AT) if (folder := runs.folder(run))]
    folders = {folder.parents[1] for folder in kept if len(folder.parents) > 1}
    missing = sorted(folder for folder in folders if not folder.is_dir())
    text = f"the {len(folders)} folders of the newest {len(kept)} runs with files here"
    if missing:
        fault = f"{len(missing)} of {text} are missing, such as {missing[0]}"
        return Checked("artifacts", "failure", fault, MOVED)
    if file:
        beside = file.absolute().parent.resolve()
        apart = sorted(folder for folder in folders if not folder.resolve().is_relative_to(beside))
        if apart:
            fault = f"{len(apart)} of {text} lie elsewhere than the store, such as {apart[0]}"
            advice = f"if this store is a copy, new files go to the other's folder: {MOVED}"
            return Checked("artifacts", "warning", fault, advice)
    return Checked("artifacts", "ok", f"{text} are there")


def _late() -> Checked:
    """Doubles that a server made after its client had stopped waiting for an answer."""
    made = [double.what for double in late.doubles()]
    if not made:
        return Checked("late", "ok", "the server made nothing after its client had stopped waiting")
    names = ", ".join(made[:5]) + (", …" if len(made) > 5 else "")
    text = f"{len(made)} made twice, after a client had stopped waiting: {names}"
    return Checked("late", "warning", plain(text), "remove what is double with lsa sync")


def _runs(end: bool) -> Checked:
    running = list(runs.running())
    gone = [run for run in running if provenance.gone(run.tags)]
    elsewhere = [run for run in running if run.tags.get("lsa.host") != provenance.host()]
    text = f"{len(running)} are RUNNING"
    if elsewhere:
        text += f", {len(elsewhere)} of them on other machines, of which nothing is known here"
    if not gone:
        return Checked("runs", "ok", text)
    names = ", ".join(f"{run.name} ({run.run_id[:8]})" for run in gone[:5])
    names += ", …" if len(gone) > 5 else ""
    if end:
        for run in gone:
            runs.end_gone(run.run_id)
        return Checked("runs", "ok", f"{text}; ended {len(gone)} whose process is gone: {names}")
    text += f"; the process of {len(gone)} is gone: {names}"
    return Checked("runs", "warning", plain(text), "end them with lsa doctor --end-stale")

"""A disk that is full and a folder that cannot be written: one line, and a store that holds."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from processes import forked

from faults import Row
from lsa.cli import app
from lsa.tracking import registry, runs, store

PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [8000]}
train: {epochs: 2, batch_size: 50, checkpoint_every: 1}
optimizers: {adamw: {name: AdamW, lr: 0.01}}
landscape: {samples: 64}
probes: {lanczos: {k: 1, density_probes: 0, split: "no"}}
"""
TRAIN = ["train", "--project", "tiny", "--optimizer", "adamw"]
PROBE = ["lanczos", "--project", "tiny", "--optimizer", "adamw"]
# A checkpoint is 2.4 MB of weights and as much again twice for AdamW.
FREE = (4, 500, 3000, 8000, 15000)  # kB left
LIMITS = (1, 2000, 4000)  # kB that a file may have: of the database, the weights, the state


def mountable() -> bool:
    """Whether this process may mount a small disk."""
    return os.name == "posix" and os.geteuid() == 0 and shutil.which("mount") is not None


@contextlib.contextmanager
def disk(folder: Path, size: str = "64m") -> Iterator[Path]:
    """A small disk of its own."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def place(folder: Path, *, made: bool = True) -> Iterator[None]:
    """A folder with the project, as the current one; its store is made at once or later."""
    (folder / "projects").mkdir(parents=True)
    (folder / "projects" / "tiny.yaml").write_text(PROJECT)
    before, addresses = Path.cwd(), store.addresses()
    os.chdir(folder)
    store.use(f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/mlflow.db")
    try:
        if made:
            store.client()
        yield
    finally:
        os.chdir(before)
        store.use(*addresses)


def run(arguments: list[str], *, process: bool = False) -> tuple[int, str]:
    """Exit code and what a command says on stderr, here or in a process of its own."""
    if process:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": store.uri()}
        done = forked(*arguments, env=environment)
        return done.returncode, done.stderr
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = app.run(arguments)
    return code, said.getvalue()


def refused(arguments: list[str], *, process: bool = False) -> str:
    """The last line of a command that fails.

    Raises:
        AssertionError: It did not fail, or not in one line.
    """
    code, said = run(arguments, process=process)
    assert code != 0 and said.startswith("lsa: ") and said.count("\n") == 1, (code, said)
    return said


def check_store() -> None:
    """Every finished run has its results, every registered version its files.

    Raises:
        AssertionError: One has not.
    """
    client = store.client()
    for found in client.search_runs(store.experiments(), "attributes.status = 'FINISHED'"):
        step, tags = found.data.tags["lsa.step"], found.data.tags
        if step == "train":
            registry.fetch(tags["lsa.checkpoint"])
            assert "final/val_accuracy" in found.data.metrics
        else:
            stored = runs.artifact(found.info.run_id, f"{step}.json")
            assert {f"{step}/{name}" for name in stored["metrics"]} <= found.data.metrics.keys()
    for version in client.search_model_versions():
        registry.fetch(f"models:/{version.name}/{version.version}")


def recovers() -> None:
    """With the fault gone, the same commands succeed and the store is whole."""
    for arguments in (TRAIN, PROBE):
        code, said = run(arguments)
        assert code == 0, said
    check_store()


@contextlib.contextmanager
def filled(folder: Path, kilobytes: int) -> Iterator[None]:
    """Leave so much space on a disk."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(folder).free - 1024 * kilobytes))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def limited(kilobytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(folder: Path, left: Sequence[int] = FREE) -> list[str]:
    """Train and measure on a disk that fills up at different moments; what was said."""
    said = []
    for kilobytes in left:
        with disk(folder / f"full-{kilobytes}") as mounted, place(mounted):
            with filled(mounted, kilobytes):
                said.append(refused(TRAIN))
            check_store()
            code, errors = run(TRAIN)
            assert code == 0, errors
            with filled(mounted, kilobytes // 40):
                said.append(refused(PROBE))
            check_store()
            recovers()
    return said


def too_large(folder: Path) -> list[str]:
    """Train where no file may grow beyond a size; what was said."""
    said = []
    for kilobytes in LIMITS:
        with place(folder / f"limit-{kilobytes}"):
            with limited(kilobytes):
                said.append(refused(TRAIN))
            check_store()
            recovers()
    return said


def read_only(folder: Path) -> list[str]:
    """Train and measure on a disk that turns read-only; what was said."""
    # In processes of their own: one that holds the database open keeps the disk writable.
    with disk(folder / "read-only") as mounted, place(mounted, made=False):
        code, errors = run(TRAIN, process=True)
        assert code == 0, errors
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        try:
            said = [refused(arguments, process=True) for arguments in (TRAIN, PROBE)]
        finally:
            subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)
        check_store()
        recovers()
    return said


def rows(folder: Path) -> list[Row]:
    """The faults of this module; those that need a disk of their own only where root runs them."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = "one line: which file, and whether space or permission is missing; exit code 1"
    found = [Row("file too large", "RLIMIT_FSIZE", len(too_large(folder)), "nothing", seen)]
    if mountable():
        times = len(full(folder))
        found.append(Row("disk full", "a small tmpfs that fills up", times, "nothing", seen))
        times = len(read_only(folder))
        found.append(Row("folder read-only", "remounted read-only", times, "nothing", seen))
    return found

"""Checkpoints whose files are cut off, altered or gone: told in one line, never measured."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from faults import Row
from lsa.project import Project
from lsa.runtime import provenance
from lsa.runtime.errors import InputError
from lsa.tracking import checkpoint, serial
from lsa.tracking.checkpoint import CONFIG, OPTIMIZER, WEIGHTS, Checkpoint
from lsa.training import train as training

FILES = (CONFIG, WEIGHTS, OPTIMIZER)
PLACES, BITS = 20, 200


def tiny() -> Checkpoint:
    """A checkpoint of one epoch with an optimizer's state."""
    setting = Project.model_validate(
        {
            "name": "tiny",
            "dataset": {"name": "digits", "train_limit": 60, "val_limit": 20},
            "model": {"name": "mlp", "hidden": [4]},
            "train": {"epochs": 1, "batch_size": 30},
            "optimizers": {"adamw": {"name": "AdamW", "lr": 0.01}},
            "landscape": {"samples": 32},
        }
    )
    recipe = setting.recipe("adamw")
    split = checkpoint.load_data(recipe, "cpu")
    (epoch,) = training.train(recipe, split)
    return Checkpoint(
        recipe=recipe,
        epoch=1,
        weights=epoch.state["model"],
        optimizer_state=epoch.state["optimizer"],
        data_hash=split.hash,
        versions=provenance.versions(),
    )


def content(source: Checkpoint) -> str:
    """What identifies all that a checkpoint says."""
    return serial.digest(
        {
            "recipe": source.recipe.model_dump(),
            "rest": [source.epoch, source.data_hash, dict(source.versions)],
            "weights": dict(source.weights),
            "optimizer": source.optimizer_state,
        }
    )


def refused(folder: Path, whole: str) -> bool:
    """Whether a damaged checkpoint is refused in one line.

    Raises:
        AssertionError: It was read as another one, or refused in another way.
    """
    try:
        found = checkpoint.read(folder)
    except InputError as error:
        message = str(error)
        assert "\n" not in message and "is no whole lsa checkpoint" in message, message
        return True
    assert content(found) == whole, "a damaged checkpoint was read as another one"
    return False


def truncated(source: Path, scratch: Path) -> list[bool]:
    """Cut the files off at places spread over all three."""
    whole, sizes = content(checkpoint.read(source)), [(source / f).stat().st_size for f in FILES]
    found = []
    for place in range(PLACES):
        cut = place * sum(sizes) // PLACES
        file = next(i for i in range(len(FILES)) if cut < sum(sizes[: i + 1]))
        damaged = _copy(source, scratch)
        with (damaged / FILES[file]).open("r+b") as stream:
            stream.truncate(cut - sum(sizes[:file]))
        found.append(refused(damaged, whole))
    return found


def flipped(source: Path, scratch: Path, *, seed: int = 0) -> list[bool]:
    """Flip one bit at a time, as often in each file."""
    whole, rng = content(checkpoint.read(source)), random.Random(seed)
    found = []
    for i in range(BITS):
        damaged = _copy(source, scratch)
        file = damaged / FILES[i % len(FILES)]
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        found.append(refused(damaged, whole))
    return found


def missing(source: Path, scratch: Path) -> list[bool]:
    """Take each file away."""
    whole, found = content(checkpoint.read(source)), []
    for file in FILES:
        damaged = _copy(source, scratch)
        (damaged / file).unlink()
        found.append(refused(damaged, whole))
    return found


def _copy(source: Path, scratch: Path) -> Path:
    damaged = scratch / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(source, damaged)
    return damaged


def rows(folder: Path) -> list[Row]:
    """The faults of this module, injected in a folder."""
    source = folder / "checkpoint"
    source.mkdir(parents=True)
    checkpoint.save(tiny(), source)
    cut, gone, bits = (damage(source, folder) for damage in (truncated, missing, flipped))
    assert all(cut) and all(gone)
    harmless = bits.count(False)
    said = "one line: the checkpoint is incomplete or altered, and in what; exit code 2"
    read = f"; {harmless} of the bits mean nothing, and the same was read" if harmless else ""
    return [
        Row("checkpoint truncated", f"cut off at {PLACES} places", len(cut), "nothing", said),
        Row("checkpoint's file deleted", "each of its files", len(gone), "nothing", said),
        Row("checkpoint altered", "one bit flipped", BITS, "nothing", said + read),
    ]

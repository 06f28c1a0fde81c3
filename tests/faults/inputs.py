"""Malformed projects, options and command lines: each gets one line and exit code 2."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from processes import forked

from faults import Row
from lsa import probe, project
from lsa.cli import app
from lsa.runtime.errors import InputError
from lsa.tracking import checkpoint
from lsa.training import train as training

BASE: dict[str, Any] = {
    "dataset": {"name": "digits", "train_limit": 60, "val_limit": 20},
    "model": {"name": "mlp", "hidden": [4], "activation": "tanh"},
    "train": {
        "epochs": 2,
        "batch_size": 30,
        "checkpoint_every": 1,
        "schedule": {"name": "cosine", "warmup_epochs": 1},
        "augment": {"crop": 0, "flip": False},
    },
    "optimizers": {"sgd": {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True}},
    "seeds": [0],
    "landscape": {"samples": 32},
    "probes": {"lanczos": {"k": 1, "tol": 0.1, "split": "no"}},
    "pairs": {"interpolation": {"points": 5}},
    "trajectory": {"sgd_noise": {}},
}
WRONG = [
    None, True, -1, 0, 1.5, 10**400, -math.inf, math.nan, "", "x", "1e", "a:b", "os:system",
    "<script>", "\x1b[2J", "x" * 5000, [], [None], ["x"], [[1]], {}, {"a": 1}, {"name": "x"},
    {1: {2: 3}}, yaml.safe_load("2020-01-01"),
]  # fmt: skip
# What YAML reads as something else than it looks like: what is replaced, by what, and what is said.
TEXTS = {
    "a date": ("lr: 0.1", "lr: 2020-01-01", "2020-01-01 is a date to YAML"),
    "a time of day": ("lr: 0.1", "lr: 1:30", "1:30 is another number to YAML"),
    "bytes": ("lr: 0.1", "lr: !!binary aGVsbG8=", "leave the tag out"),
    "a set": ("lr: 0.1", "lr: !!set {a, b}", "leave the tag out"),
    "no number": ("lr: 0.1", "lr: .nan", "lr=nan must be a finite number"),
    "no finite number": ("lr: 0.1", "lr: .inf", "lr=inf must be a finite number"),
    "an octal seed": ("seeds:\n- 0", "seeds: [010]", "010 is another number to YAML"),
    "a sexagesimal seed": ("seeds:\n- 0", "seeds: [1:30]", "1:30 is another number to YAML"),
    "a seed of true": ("seeds:\n- 0", "seeds: [yes]", "seeds.0=True must be a valid integer"),
    "a seed of text": ("seeds:\n- 0", "seeds: ['1']", "seeds.0='1' must be a valid integer"),
    "a seed of 1.0": ("seeds:\n- 0", "seeds: [1.0]", "seeds.0=1.0 must be a valid integer"),
    "a seed twice": ("seeds:\n- 0", "seeds: [3, 3]", "seeds=[3, 3] must be distinct"),
    "epochs of true": ("epochs: 2", "epochs: yes", "epochs=True must be a valid integer"),
    "2⁶³ samples a batch": ("batch_size: 30", f"batch_size: {2**63}", "less than 2147483648"),
    "a key that is true": ("dataset:", "on: 1\ndataset:", "'on' is true or false to YAML"),
    "a key that is a number": ("  sgd:\n", "  0.01:\n", "'0.01' is a number to YAML"),
    "a key that is nothing": ("  sgd:\n", "  null:\n", "'null' is nothing to YAML"),
    "a key that is a date": ("  sgd:\n", "  2020-01-01:\n", "2020-01-01 is a date to YAML"),
    "an option twice": ("lr: 0.1", "lr: 0.1\n    lr: 0.2", "the key 'lr' twice"),
    "a section twice": ("dataset:", "seeds: [1]\ndataset:", "the key 'seeds' twice"),
    "two optimizers of one name": (
        "optimizers:\n", "optimizers:\n  sgd: {name: Adam}\n", "the key 'sgd' twice",
    ),
}  # fmt: skip
COMMANDS = [
    shlex.split(line)
    for line in (
        "train",
        "train --optimizer nope",
        "train --optimizer",
        "nope",
        "--nope",
        "train --optimizer sgd --epochs x",
        "train --optimizer sgd --lr -1",
        "train --optimizer sgd --epochs 0",
        "train --optimizer sgd --seed a",
        "train --optimizer sgd --device abacus",
        "train --optimizer sgd x",
        "train --optimizer sgd --resume maybe",
        "train --project nope.yaml",
        "study nope",
        "study nope.yaml",
        "study digits --only nope",
        "study digits --workers x",
        "study digits --workers 0 --only x",
        "study digits --workers 0 --dry-run",
        "mode_graph digits --workers 0 --plan",
        "report nope",
        "compare nope",
        "compare digits",
        "report digits",
        "show",
        "show nope",
        'show "\'"',
        "show models:/a/1",
        "show runs:/x/y",
        'checkpoints --project "\'"',
        "lanczos",
        "lanczos --checkpoint nope",
        "lanczos --checkpoint models:/",
        "lanczos --checkpoint models:/../../etc/1",
        "lanczos --checkpoint models:/a@b",
        "lanczos --checkpoint runs:/../x",
        "lanczos --checkpoint a --optimizer sgd",
        "interpolation --optimizer sgd",
    )
]


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a document."""
    if path:
        yield path
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(child, (*path, key))


def replaced(path: tuple, value: Any) -> dict[str, Any]:
    """The base project with another value at a place."""
    found = copy.deepcopy(BASE)
    node: Any = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return found


def malformed() -> Iterator[dict[str, Any]]:
    """Projects with one wrong value each, some of them right by chance."""
    for path in places(BASE):
        for value in WRONG:
            yield replaced(path, value)
        missing = replaced(path, None)
        node: Any = missing
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        yield missing
        if isinstance(path[-1], str):
            yield replaced((*path[:-1], path[-1] + "s"), 1)


def refusal(file: Path) -> str | None:
    """The line that a project file gets, or None where it can be trained by.

    Any other exception than InputError passes through: it is a traceback for the user.
    """
    try:
        setting = project.load(str(file))
        recipe = setting.recipe(next(iter(setting.optimizers)))
        split = checkpoint.load_data(recipe, "cpu")
        training.initial(recipe, split)
    except InputError as error:
        message = str(error)
        assert message and message.isprintable(), message
        return message
    return None


def projects(folder: Path, every: int = 1) -> tuple[int, int]:
    """How many malformed projects were refused, and how many were right by chance.

    Args:
        folder: To write them into.
        every: Take each so many-th.
    """
    refused = right = 0
    for content in itertools.islice(malformed(), 0, None, every):
        file = folder / "p.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        try:
            line = refusal(file)
        except Exception as error:
            raise AssertionError(f"{error!r} for {file.read_text()}") from error
        refused, right = refused + (line is not None), right + (line is None)
    return refused, right


def texts(folder: Path) -> int:
    """Projects that YAML reads as another than they look like; their number."""
    whole = yaml.safe_dump(BASE)
    for old, new, said in TEXTS.values():
        assert old in whole
        file = folder / "p.yaml"
        file.write_text(whole.replace(old, new, 1), encoding="utf-8")
        line = refusal(file)
        assert line and said in line, (new, line)
    return len(TEXTS)


def options() -> int:
    """How many wrong values of the probes' options were refused."""
    refused = 0
    for name in probe.modules():
        declared = probe.find(name)
        for option in (*declared.options, "nope"):
            for value in WRONG:
                try:
                    project.resolve(declared, {option: value}, "test")
                except InputError as error:
                    assert str(error).isprintable()
                    refused += 1
    return refused


def commands(*, every: int = 1, processes: bool = False) -> int:
    """Malformed command lines, in this process or in one of their own; their number."""
    taken = COMMANDS[::every]
    for arguments in taken:
        if processes:
            done = forked(*arguments)
            code, errors = done.returncode, done.stderr
        else:
            stream = io.StringIO()
            with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(io.StringIO()):
                code = app.run(arguments)
            errors = stream.getvalue()
        assert code == 2, (arguments, code, errors)
        assert errors.count("\n") == 1 and errors.startswith("lsa: "), (arguments, errors)
    return len(taken)


def rows(folder: Path) -> list[Row]:
    """The faults of this module."""
    folder.mkdir(parents=True, exist_ok=True)
    refused, _ = projects(folder)
    assert refused >= 200
    before = Path.cwd()
    os.chdir(folder)
    try:
        lines, in_processes = commands(), commands(every=6, processes=True)
    finally:
        os.chdir(before)
    misread = texts(folder)
    said = "one line: the value, the rule, what to do; exit code 2"
    return [
        Row("malformed project", "one wrong value in each field", refused, "nothing", said),
        Row("misread project", "values that YAML reads as another type", misread, "nothing", said),
        Row(
            "malformed option",
            "wrong values for each option of each probe",
            options(),
            "nothing",
            said,
        ),
        Row("malformed command line", "in one process", lines, "nothing", said),
        Row("malformed command line", "each in its own process", in_processes, "nothing", said),
    ]

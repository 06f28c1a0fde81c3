"""Weights of exported programs, as torch reads them; and programs made to harm the reader."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lsa.runtime.errors import InputError
from lsa.training import exported, foreign


class Network(nn.Module):
    """Tied, transposed and empty weights, and buffers of other types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.short = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.empty(0, 3))

    def forward(self, x):
        x = self.tied(self.first(x)) @ self.turned
        return x * self.count + self.mask.sum() + self.short.float().sum() + self.none.sum()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[Path, nn.Module]:
    path, model = tmp_path_factory.mktemp("exported") / "model.pt2", Network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that a weight is turned
        torch.export.save(torch.export.export(model, (torch.ones(2, 3),)), path)
    return path, model


def test_weights_are_those_that_torch_reads(program):
    path, model = program
    read, expected = foreign.read(path).weights, torch.export.load(path).state_dict
    assert read.keys() == expected.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype, name
    assert not any(value.requires_grad for value in read.values())


class Harm:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def altered(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_among_the_weights_is_not_run(program, tmp_path, wrapped):
    proof = tmp_path / "proof"
    content = pickle.dumps(Harm(proof))
    if wrapped:  # as torch.save writes it
        stream = io.BytesIO()
        torch.save(Harm(proof), stream)
        content = stream.getvalue()

    with zipfile.ZipFile(program[0]) as archive:
        (file,) = [n for n in archive.namelist() if n.endswith("model_weights_config.json")]
        config = json.loads(archive.read(file))
    config["config"]["turned"]["use_pickle"] = True
    weight = f"weights/{config['config']['turned']['path_name']}"

    def change(name: str, old: bytes) -> bytes:
        return (
            json.dumps(config).encode()
            if name == file
            else content
            if name.endswith(weight)
            else old
        )

    path = altered(program[0], tmp_path / "harm.pt2", change)
    with pytest.raises(InputError, match=r"harm\.pt2 (would run code|cannot be read)"):
        foreign.read(path)
    assert not proof.exists()


def test_expressions_of_a_program_are_not_evaluated(program, tmp_path):
    """torch reads the bounds of a program's sizes with sympy, which evaluates them as Python."""
    proof = tmp_path / "proof"
    harm = f"__import__('pathlib').Path({str(proof)!r}).touch()"

    def change(name: str, old: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return old
        content = json.loads(old)
        symbol = {"as_expr": {"expr_str": harm, "hint": None}}
        for meta in content["graph_module"]["graph"]["tensor_values"].values():
            meta["sizes"] = [symbol for _ in meta["sizes"]]
        return json.dumps(content).encode()

    path = altered(program[0], tmp_path / "harm.pt2", change)
    assert foreign.read(path).weights.keys() == program[1].state_dict().keys()
    assert not proof.exists()


def larger(meta: dict) -> None:
    meta["tensor_meta"]["sizes"] = [{"as_int": 10**9}, {"as_int": 10**9}]
    meta["tensor_meta"]["strides"] = [{"as_int": 0}, {"as_int": 0}]


def beyond(meta: dict) -> None:
    meta["tensor_meta"]["storage_offset"] = {"as_int": 10**6}


def elsewhere(meta: dict) -> None:
    meta["path_name"] = "../../../../etc/passwd"


def no_type(meta: dict) -> None:
    meta["tensor_meta"]["dtype"] = 99


def no_size(meta: dict) -> None:
    meta["tensor_meta"]["sizes"] = [{"as_expr": "1"}]


@pytest.mark.parametrize("damage", [larger, beyond, elsewhere, no_type, no_size])
def test_what_a_list_of_weights_claims_is_checked(program, tmp_path, damage):
    def change(name: str, old: bytes) -> bytes:
        if not name.endswith("model_weights_config.json"):
            return old
        config = json.loads(old)
        damage(config["config"]["turned"])
        return json.dumps(config).encode()

    path = altered(program[0], tmp_path / "damaged.pt2", change)
    with pytest.raises(ValueError, match=r"no exported program|are no tensor"):
        exported.weights(path)
    with pytest.raises(InputError, match=r"^damaged\.pt2 cannot be read \(.*\); save it again$"):
        foreign.read(path)


def test_a_truncated_program_is_refused_in_one_line(program, tmp_path):
    whole = program[0].read_bytes()
    for share in (0.0, 0.3, 0.6, 0.99):
        cut = tmp_path / "cut.pt2"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"^cut\.pt2 cannot be read"):
            foreign.read(cut)

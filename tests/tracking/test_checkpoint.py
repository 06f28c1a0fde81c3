"""A checkpoint's folder: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from faults import checkpoints as damage
from safetensors.torch import save_file

import lsa
from lsa.cli import app
from lsa.project import project
from lsa.runtime.errors import InputError
from lsa.tracking import checkpoint, runs, serial, store
from lsa.training import recipes

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


@pytest.fixture(scope="module")
def source():
    return damage.tiny()


@pytest.fixture
def folder(source, tmp_path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    checkpoint.save(source, path)
    return path


def altered(folder: Path, **changes: object) -> None:
    """Change `config.json`, with a digest that fits again where the content allows one."""
    config = json.loads((folder / checkpoint.CONFIG).read_text()) | changes
    (folder / checkpoint.CONFIG).write_text(json.dumps(config))


def test_what_was_written_comes_back(source, folder):
    assert damage.content(checkpoint.read(folder)) == damage.content(source)


def test_the_digest_is_of_the_content_alone():
    tree = {"a": torch.tensor([1.0, 2.0]), 1: [True, None, "x"], "b": ()}
    other = {"b": (), 1: [True, None, "x"], "a": torch.tensor([1.0, 2.0])}
    assert serial.digest(tree) == serial.digest(other)
    for changed in (
        {**tree, "a": torch.tensor([1.0, -2.0])},
        {**tree, "a": torch.tensor([[1.0, 2.0]])},
        {**tree, "a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {**tree, 1: [1, None, "x"]},
        {**tree, "b": []},
        {**tree, "1": tree[1]},
    ):
        assert serial.digest(changed) != serial.digest(tree)


def test_truncated_altered_and_missing_files_are_refused_in_one_line(folder, tmp_path):
    assert all(damage.truncated(folder, tmp_path))
    assert all(damage.missing(folder, tmp_path))
    bits = damage.flipped(folder, tmp_path)
    assert len(bits) == 200 and bits.count(True) > 150


def test_an_older_checkpoint_without_a_digest_is_read(source, folder):
    altered(folder, sha256="")
    assert damage.content(checkpoint.read(folder)) == damage.content(source)


# --- from a hostile store -------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.CONFIG])
@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_in_place_of_a_file_does_not_run(folder, tmp_path, name, write):
    ran = tmp_path / "ran"
    with (folder / name).open("wb") as file:
        write(Bomb(ran), file)
    with pytest.raises(InputError, match="no whole lsa checkpoint"):
        checkpoint.read(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "model", ["os:system", "subprocess:call", "builtins:eval", "torch.hub:load", "lsa.cli.app:run"]
)
def test_a_factory_out_of_a_checkpoint_does_not_run_unless_trusted(source, folder, model):
    """The attacker writes a digest that fits: what protects is the trust rule."""
    recipe = source.recipe.model_dump() | {"model": {"name": model, "command": "touch ran"}}
    config = json.loads((folder / checkpoint.CONFIG).read_text()) | {"recipe": recipe}
    config["sha256"] = checkpoint._digest(config, source.weights, source.optimizer_state)
    altered(folder, **config)
    found = checkpoint.read(folder)
    with pytest.raises(InputError, match=r"not trusted|none of the modules"):
        _ = found.model
    assert not Path("ran").exists()


def test_a_million_empty_tensors_are_refused_before_they_are_read(folder, monkeypatch):
    monkeypatch.setattr(serial, "TENSORS", 100)
    save_file({str(i): torch.empty(0) for i in range(101)}, folder / checkpoint.WEIGHTS)
    with pytest.raises(InputError, match="holds 101 tensors"):
        checkpoint.read(folder)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps", "betas"])
@pytest.mark.parametrize("value", [None, "x", ("x", 0.9), (0.9,)])
def test_an_optimizer_group_that_torch_never_wrote_is_refused(source, key, value):
    (group,) = source.optimizer_state["param_groups"]
    broken = {k: v for k, v in group.items() if k != key} | ({key: value} if value else {})
    state = {**source.optimizer_state, "param_groups": [broken]}
    with pytest.raises(InputError, match=f"{key}=") as caught:
        _ = dataclasses.replace(source, optimizer_state=state).optimizer
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_weights_that_would_lose_a_part_are_refused(source, dtype):
    """Complex numbers in place of real ones; real ones in place of a count of batches."""
    model = {"name": "mlp", "hidden": (4,)} if dtype.is_complex else {"name": "resnet20"}
    recipe = source.recipe.model_copy(update={"model": project.Named.model_validate(model)})
    weights = dict(recipes.network(recipe, source.data).state_dict())
    key = "1.weight" if dtype.is_complex else "1.num_batches_tracked"
    weights[key] = weights[key].to(dtype)
    with pytest.raises(InputError, match=f"the checkpoint's {key} is {dtype}"):
        _ = dataclasses.replace(source, recipe=recipe, weights=weights).model


CONFIGS = {
    "no object": "[]",
    "null": "null",
    "empty": "",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 200 + "1" + "}" * 200,
    "huge number": "9" * 10_000,
    "latin": b'{"format": "\xe9"}',
    "nothing in it": "{}",
    "other format": '{"format": 2, "recipe": {}, "epoch": 0, "data_hash": "", "versions": {}}',
    "no recipe": '{"format": 1, "recipe": {}, "epoch": 0, "data_hash": "", "versions": {}}',
    "wrong types": '{"format": 1, "recipe": 3, "epoch": [], "data_hash": {}, "versions": 1}',
    "endless name": json.dumps({"format": "x" * 10**6}),
    "terminal codes": json.dumps({"format": "\x1b[2J\x07\nrm"}),
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_gets_one_short_line(folder, text):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / checkpoint.CONFIG).write_bytes(data)
    with pytest.raises(InputError, match="no whole lsa checkpoint") as caught:
        checkpoint.read(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1100


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER])
def test_a_header_that_claims_ten_gigabytes_allocates_nothing(folder, file):
    (folder / file).write_bytes((10 << 30).to_bytes(8, "little") + b'{"a":')
    with pytest.raises(InputError, match="no whole lsa checkpoint"):
        checkpoint.read(folder)


def test_a_tensor_that_claims_more_than_the_file_is_refused(folder):
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ).encode()
    (folder / checkpoint.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="no whole lsa checkpoint"):
        checkpoint.read(folder)


@pytest.mark.parametrize(
    "structure",
    ["{", "[]", '{"tensor": "7"}', '{"tensor": []}', '{"dict": 3}', '{"dict": [[[], 1]]}',
     '{"a": 1, "b": 2}', '{"list": 5}', "[" * 3000],
)  # fmt: skip
def test_a_hostile_structure_of_the_optimizers_state_is_refused(folder, structure):
    save_file({"0": torch.zeros(2)}, folder / checkpoint.OPTIMIZER, {"structure": structure})
    with pytest.raises(InputError):
        checkpoint.read(folder)


def test_a_state_that_no_optimizer_wrote_is_told_in_one_line(source):
    from dataclasses import replace

    for state in (
        {"param_groups": [{"params": [0, 1, 2, 3]}], "state": 5},
        {"param_groups": [3], "state": {}},
        {"param_groups": [{}], "state": {}},
        {"param_groups": [{"params": [0, 1, 2, 3], "lr": 1}], "state": {0: {"exp_avg": 1}}},
    ):
        with pytest.raises(InputError) as caught:
            _ = replace(source, optimizer_state=state).optimizer
        assert "\n" not in str(caught.value)


# --- in a store -----------------------------------------------------------------------------------


def artifacts(trained) -> Path:
    model = store.client().get_logged_model(runs.read(trained.run_id).tags["lsa.model_id"])
    return Path(model.artifact_location.removeprefix("file://"))


def test_what_was_altered_in_the_store_is_refused_even_with_a_digest_that_fits(trained, capsys):
    """Whoever can write artifacts, and not the database, cannot pass off other weights."""
    folder = artifacts(trained)
    found = checkpoint.read(folder)
    moved = {name: value + 1 for name, value in found.weights.items()}
    save_file(moved, folder / checkpoint.WEIGHTS)
    assert app.run(["lanczos", "--checkpoint", trained.run_id]) == 2
    assert "its content is not what was written" in capsys.readouterr().err
    config = json.loads((folder / checkpoint.CONFIG).read_text())
    altered(folder, sha256=checkpoint._digest(config, moved, found.optimizer_state))
    checkpoint.read(folder)  # by itself it is whole again
    with pytest.raises(InputError, match="not those that were logged"):
        lsa.load(trained.run_id)


def test_damaged_and_deleted_artifacts_get_one_line_and_no_run(trained, capsys):
    folder = artifacts(trained)
    runs = len(store.client().search_runs(store.experiments()))
    mlmodel = (folder / "MLmodel").read_text()
    for text in ("flavors: [", "- 1", "", "a: &a [*a]", mlmodel.replace(trained.run_id, "0" * 32)):
        (folder / "MLmodel").write_text(text)
        assert app.run(["lanczos", "--checkpoint", trained.run_id]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    shutil.rmtree(folder)
    assert app.run(["lanczos", "--checkpoint", trained.run_id]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no checkpoint at" in error
    assert len(store.client().search_runs(store.experiments())) == runs

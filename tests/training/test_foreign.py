"""Weights out of other code's files: read without running it, and fitted to a network's names."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lsa.runtime.errors import InputError
from lsa.training import foreign, optimizers
from lsa.training.muon import Muon


def network(width: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


class Tied(nn.Module):
    """With one matrix under two names, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(path: Path, weights: dict[str, Tensor]) -> Path:
    """As each kind of file holds weights."""
    prefixed = {f"model.{name}": value for name, value in weights.items()}
    lightning = {"state_dict": prefixed | {"loss.weight": torch.ones(2)}, "epoch": 4}
    lightning |= {"optimizer_states": [{"state": {}, "param_groups": []}], "hyper_parameters": {}}
    if path.suffix == ".ckpt":
        torch.save(lightning, path)
    elif path.suffix == ".pt":
        torch.save({"model_state_dict": weights, "optimizer": {"state": {}}, "epoch": 4}, path)
    elif path.suffix == ".pth":
        torch.save({f"module.{name}": value for name, value in weights.items()}, path)
    elif path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        path.mkdir()
        names = list(weights)
        for i, part in enumerate((names[:3], names[3:])):
            shard = {name: weights[name] for name in part}
            save_file(shard, path / f"model-0000{i + 1}-of-00002.safetensors")
    return path


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.pth", "a.safetensors", "folder"])
def test_each_kind_of_file_gives_the_weights_under_the_networks_names(tmp_path, name):
    model = network()
    content = foreign.read(save(tmp_path / name, model.state_dict()))
    assert same(foreign.fitted(content.weights, network()), model.state_dict())
    if name in ("a.ckpt", "a.pt"):
        assert content.epoch == 4 and content.optimizer is not None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_reading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    for name, write in (
        ("a.pt", torch.save),
        ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        write({"state_dict": Evil()}, tmp_path / name)
        with pytest.raises(InputError, match=r"would run code|cannot be read") as caught:
            foreign.read(tmp_path / name)
        assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match="would run code"):
        foreign.read(tmp_path / "whole.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "linear.pt")
    with pytest.raises(InputError, match=r"that it names \(torch\.nn\.modules\.linear\.Linear\)"):
        foreign.read(tmp_path / "linear.pt")


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "b.pt")
    for name, message in (
        ("none.pt", "there is no file"),
        ("empty", "holds neither"),
        ("a.txt", "ends in .txt"),
        ("cut.pt", "cannot be read"),
        ("cut.safetensors", "no safetensors file"),
        ("b.pt", r"holds no weights \(epoch, loss\)"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            foreign.read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_weights_of_another_network_do_not_fit():
    weights = network().state_dict()
    with pytest.raises(InputError, match=r"it has '2.weight', they have '0.weight'"):
        foreign.fitted({k: v for k, v in weights.items() if k != "2.weight"}, network())
    deeper = nn.Sequential(*network(), nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"the weights have '3.weight', which the factory's"):
        foreign.fitted(deeper.state_dict(), network())
    weights["2.weight"] = weights["2.weight"].flatten()
    with pytest.raises(InputError, match=r"the weights' '2.weight' has the shape"):
        foreign.fitted(weights, network())


def test_two_prefixes_that_fit_are_a_question():
    weights = network().state_dict()
    both = {f"{start}.{k}": v for start in ("net", "ema") for k, v in weights.items()}
    with pytest.raises(InputError, match=r"prefixes 'net.', 'ema.'; choose one by prefix"):
        foreign.fitted(both, network())
    assert same(foreign.fitted(both, network(), prefix="ema."), weights)


def test_a_tied_weight_that_a_file_keeps_once_gets_both_names():
    model = Tied()
    for kept in model.state_dict():
        fitted = foreign.fitted({kept: model.embedding.weight}, Tied())
        assert set(fitted) == {"embedding.weight", "head.weight"}


def test_the_state_of_a_live_optimizer_goes_back_by_the_names_of_its_groups():
    model = network()
    groups = [
        {"params": [model[2].bias, model[0].weight], "lr": 0.1},
        {"params": [model[2].weight]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    named = {k: v for k, v in model.state_dict(keep_vars=True).items()}
    stored = foreign.optimizer_state(optimizer, named)
    rule = foreign.rule_of(optimizer)
    assert rule == {"name": "AdamW", "lr": 0.01, "betas": [0.8, 0.9]}
    other = network()
    again = optimizers.restored(rule.pop("name"), stored, other, **rule)
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.01]
    assert again.param_groups[0]["params"] == [other[2].bias, other[0].weight]
    for mine, theirs in ((model[0].weight, other[0].weight), (model[2].weight, other[2].weight)):
        assert torch.equal(optimizer.state[mine]["exp_avg"], again.state[theirs]["exp_avg"])
    with pytest.raises(InputError, match="none of the model's"):
        foreign.optimizer_state(torch.optim.SGD(other.parameters()), named)


def test_the_rule_of_an_optimizer_names_a_class_that_builds_it_again():
    p = nn.Parameter(torch.ones(3, 3))
    for optimizer in (
        torch.optim.SGD([p], lr=0.3, momentum=0.9, nesterov=True),
        *([torch.optim.Muon([p])] if hasattr(torch.optim, "Muon") else []),  # of torch 2.9
        Muon([p, p.detach().clone().requires_grad_(), nn.Parameter(torch.ones(2, 3))]),
        optimizers.build("SAM", [p], base="Adam", rho=0.1),
    ):
        rule = foreign.rule_of(optimizer)
        parameters = [nn.Parameter(torch.ones(3, 3)) for _ in range(3)]
        again = optimizers.build(rule.pop("name"), parameters, **rule)
        assert type(again) is type(optimizer)
        chosen = {"fused": None}  # lsa's own choice
        assert again.defaults | chosen == optimizer.defaults | chosen


# --- files that hold something else than they should ----------------------------------------------

STRANGE = {
    "names that are no text": {0: torch.ones(2), 1: torch.ones(2)},
    "a tensor for the optimizer": {"model": {"a": torch.ones(2)}, "optimizer": torch.ones(3)},
    "a text for the optimizer": {"model": {"a": torch.ones(2)}, "optimizer": "AdamW"},
    "numbers for the optimizers": {"model": {"a": torch.ones(2)}, "optimizer_states": [3]},
    "an epoch before the first": {"model": {"a": torch.ones(2)}, "epoch": -3},
    "an epoch that no store takes": {"model": {"a": torch.ones(2)}, "epoch": 10**30},
    "an epoch that is yes": {"model": {"a": torch.ones(2)}, "epoch": True},
    "nothing": {},
    "a list": [torch.ones(2)],
}


@pytest.mark.parametrize("content", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_strange_in_a_file_is_left_out_or_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    try:
        read = foreign.read(path)
    except InputError as error:
        assert "holds no weights" in str(error) and "\n" not in str(error)
    else:
        assert same(read.weights, {"a": torch.ones(2)})
        assert read.optimizer is None and read.epoch is None


def test_damaged_files_are_refused_in_one_line(tmp_path):
    """Bits flipped and bytes cut off: torch's own reader then raises whatever it meets."""
    rng, refused = random.Random(0), 0
    for kind in (".pt", ".safetensors", "legacy.pt"):
        whole = tmp_path / f"whole{kind}"
        if kind == ".safetensors":
            save_file(network().state_dict(), whole)
        else:
            zipped = kind == ".pt"
            torch.save(network().state_dict(), whole, _use_new_zipfile_serialization=zipped)
        content = whole.read_bytes()
        for i in range(60):
            damaged = bytearray(content)
            place = rng.randrange(min(len(content), 900))  # where the description is
            damaged[place] ^= 1 << rng.randrange(8)
            path = tmp_path / f"damaged{kind}"
            path.write_bytes(damaged[: rng.randrange(len(content))] if i % 4 == 0 else damaged)
            try:
                foreign.read(path)
            except InputError as error:
                refused += 1
                assert path.name in str(error) and "\n" not in str(error)
    assert refused > 60


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    """A million of empty ones takes minutes to read."""
    path = tmp_path / "a.safetensors"
    save_file({f"t{i}": torch.empty(0) for i in range(11)}, path)
    monkeypatch.setattr(foreign, "TENSORS", 10)
    with pytest.raises(InputError, match=r"a\.safetensors .*it holds 11 tensors"):
        foreign.read(path)
    monkeypatch.setattr(foreign, "TENSORS", 11)
    assert len(foreign.read(path).weights) == 11

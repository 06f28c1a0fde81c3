"""Training by an objective on batches: against a loop by hand, and from a project to a probe."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import largest, of_theta
from token_model import SOURCE, printed
from torch import nn

from lsa.cli import app
from lsa.landscape import flatten
from lsa.project import Project, Recipe
from lsa.runtime.errors import InputError
from lsa.training import data
from lsa.training.train import Epoch, train

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

NAME = "texts_of_mine"
PROJECT = f"""
name: texts
dataset: {{name: "{NAME}:texts"}}
model: {{name: "{NAME}:Model", width: 3}}
objective: {{name: per_token}}
optimizers: {{sgd: {{name: SGD, lr: 0.2}}}}
train: {{epochs: 2, clip_norm: 0.3, ema: 0.5, checkpoint_every: 1}}
landscape: {{samples: all}}
"""


@pytest.fixture
def parts(workplace: Path, monkeypatch) -> Any:
    (workplace / f"{NAME}.py").write_text(SOURCE)
    (workplace / "texts.yaml").write_text(PROJECT)
    monkeypatch.syspath_prepend(str(workplace))
    yield __import__(NAME)
    sys.modules.pop(NAME, None)


def recipe(**budget: Any) -> Recipe:
    setting = {
        "name": "texts",
        "dataset": {"name": f"{NAME}:texts"},
        "model": {"name": f"{NAME}:Model", "width": 3},
        "objective": {"name": "per_token"},
        "optimizers": {"sgd": {"name": "SGD", "lr": 0.2}},
        "train": {"epochs": 3, **budget},
    }
    return Project.model_validate(setting).recipe("sgd")


def epochs_of(at: Recipe, state: Any = None) -> list[Epoch]:
    split = data.streams(at.dataset.name, trusted=[NAME])
    return [copy.deepcopy(e) for e in train(at, split, trusted=[NAME], state=state)]


def mean(model: Any, batches: list[dict]) -> torch.Tensor:
    """Cross entropy per token that counts, shifted by one."""
    logits = torch.cat([model(b["input_ids"])[:, :-1].reshape(-1, 7) for b in batches])
    return F.cross_entropy(logits, torch.cat([b["labels"][:, 1:].reshape(-1) for b in batches]))


def start(parts: Any, at: Recipe) -> nn.Module:
    """The network before the first step."""
    from lsa.training.train import initial

    model = parts.Model(width=3)
    split = data.streams(at.dataset.name, trusted=[NAME])
    model.load_state_dict(initial(at, split, [NAME])["model"])
    return model


def test_an_epoch_is_that_of_a_loop_by_hand(parts):
    with torch.random.fork_rng():
        at = recipe(epochs=2, clip_norm=0.3)
        model = start(parts, at)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    norms, losses = [], []
    for _ in range(2):
        for batch in parts.texts()[0]:
            optimizer.zero_grad()
            loss = mean(model, [batch])
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
            weight = int((batch["labels"][:, 1:] != -100).sum())
            losses.append((loss.item() * weight, weight))
            optimizer.step()
    last = epochs_of(at)[-1]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(last.state["model"][name], value, rtol=1e-5, atol=1e-7)
    total, weight = (sum(part) for part in zip(*losses[3:], strict=True))
    assert last.metrics["train/loss"] == pytest.approx(total / weight, rel=1e-5)
    assert last.metrics["train/gradient_norm"] == pytest.approx(sum(norms[3:]) / 3, rel=1e-5)
    assert last.metrics["val/loss"] == pytest.approx(mean(model, parts.texts()[1]).item(), rel=1e-5)
    assert not any("accuracy" in name for name in last.metrics)


def test_an_interrupted_training_ends_where_a_whole_one_does(parts):
    whole = epochs_of(recipe(ema=0.5))
    again = epochs_of(recipe(ema=0.5), state=whole[0].state)
    assert [e.number for e in again] == [2, 3]
    for name, value in whole[-1].state["model"].items():
        assert torch.equal(again[-1].state["model"][name], value)
    assert not torch.equal(
        whole[-1].state["model"]["head.bias"], whole[-1].state["stepped"]["head.bias"]
    )


def test_crops_of_batches_are_refused(parts):
    with pytest.raises(InputError, match="augment takes images as tensors"):
        epochs_of(recipe(augment={"flip": True}))


@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_a_language_model_of_a_project_is_trained_and_measured(parts, workplace: Path, capsys):
    assert app.run(["train", "--project", "texts.yaml", "--optimizer", "sgd"]) == 0
    out = capsys.readouterr().out
    run = next(line.split()[1] for line in out.splitlines() if line.startswith("run "))
    measured = ["lanczos", "--checkpoint", run, "--k", "1", "--density-probes", "0"]
    assert app.run(measured) == 2
    assert "allow it with --trust" in capsys.readouterr().err
    assert app.run([*measured, "--trust", NAME]) == 0
    found = printed(capsys.readouterr().out)
    import lsa

    model = lsa.load(run, trust=[NAME]).model.double()
    expected = largest(model, lambda model: mean(model, parts.texts()[0]))
    assert found == pytest.approx(expected, rel=1e-3)


WATCHED = "watch: {every: 2, budget: null, measure: [update, noise, sharpness, batch_sharpness]}"


@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_a_watch_of_a_training_by_an_objective_measures_the_loss_of_all_batches(
    parts, workplace: Path, capsys
):
    """Against dense derivatives at the steps of a loop by hand; the training stays the same."""
    import mlflow

    plain = PROJECT.replace(", ema: 0.5, checkpoint_every: 1", "")
    client, runs = mlflow.MlflowClient(), []
    for name, text in ("plain", plain), ("watched", plain.replace("clip_", f"{WATCHED}, clip_")):
        (workplace / f"{name}.yaml").write_text(text.replace("name: texts", f"name: {name}"))
        assert app.run(["train", "--project", f"{name}.yaml", "--optimizer", "sgd"]) == 0
        out = capsys.readouterr().out
        run = next(line.split()[1] for line in out.splitlines() if line.startswith("run "))
        names = client.get_run(run).data.metrics
        values = {n: client.get_metric_history(run, n) for n in names if "seconds" not in n}
        runs.append({n: {m.step: m.value for m in v} for n, v in values.items()})
    before, watched = runs
    assert before == {n: v for n, v in watched.items() if not n.startswith("watch/")}

    with torch.random.fork_rng():
        model = start(parts, recipe(clip_norm=0.3))
    batches = parts.texts()[0]
    loss = of_theta(model, lambda model: mean(model, batches))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step, batch in enumerate(batches + batches, 1):
        optimizer.zero_grad()
        mean(model, [batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        at = flatten(model)
        optimizer.step()
        if step % 2:
            continue
        u, H = flatten(model) - at, torch.autograd.functional.hessian(loss, at).double()
        after = torch.autograd.functional.hessian(loss, at + u)
        (g,) = torch.autograd.grad(loss(t := at.clone().requires_grad_()), t)
        v = u.double() / u.double().norm()
        expected = {
            "directional_sharpness": v @ H @ v,
            "gain": loss(at) - loss(at + u),
            "gain_first_order": -(g @ u),
            "lambda_max": torch.linalg.eigvalsh(after)[-1],
            "probe_loss": loss(at),
            "threshold": torch.tensor(10.0),
        }
        for name, value in expected.items():
            found = watched[f"watch/{name}"][step]
            assert found == pytest.approx(float(value), rel=1e-2, abs=1e-6), (name, step)


GPT = """
from transformers import GPT2Config, GPT2LMHeadModel

def gpt():
    sizes = {"vocab_size": 7, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0))
"""


@pytest.mark.models
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_model_of_a_project_is_trained_by_its_own_loss(parts, workplace: Path):
    """As it is, with a watch; its steps are those of a loop by hand."""
    pytest.importorskip("transformers")
    import lsa
    from lsa import project
    from lsa.studies import train as studied

    (workplace / f"{NAME}.py").write_text(SOURCE + GPT)
    sys.modules.pop(NAME)
    text = PROJECT.replace(":Model", ":gpt").replace(", width: 3", "").replace("per_token", "hf")
    text = text.replace("ema: 0.5, checkpoint_every: 1", f"{WATCHED}")
    (workplace / "texts.yaml").write_text(text)
    at = project.load("texts.yaml").recipe("sgd")
    split = data.streams(at.dataset.name, trusted=[NAME])
    done = studied.train(at, trusted=[NAME])
    from lsa.training.train import initial

    with torch.random.fork_rng():
        model = __import__(NAME).gpt()
        model.load_state_dict(initial(at, split, [NAME])["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for batch in [*parts.texts()[0], *parts.texts()[0]]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    found = lsa.load(done.run_id, trust=[NAME])
    torch.testing.assert_close(found.theta, expected, rtol=1e-4, atol=1e-6)
    import mlflow

    numbers = mlflow.MlflowClient().get_run(done.run_id).data.metrics
    assert {"watch/lambda_max", "watch/noise_trace", "watch/gain", "watch/loss"} <= numbers.keys()

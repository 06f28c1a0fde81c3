"""Checkpoints of other code: registered, measured, compared, studied; against plain torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from dense import largest
from safetensors.torch import save_file
from theirs import NAME, PARTS, study
from token_model import SOURCE, printed
from torch import nn

import lsa
from lsa import project
from lsa.cli import app
from lsa.landscape import Landscape, flatten
from lsa.runtime.errors import InputError
from lsa.studies import plan
from lsa.studies import train as train_step
from lsa.tracking import registered
from lsa.training import data

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]

NAMED = {"factory": f"{NAME}:line", "data": f"{NAME}:waves", "loss": "MSELoss", "project": "tiny"}


def trained(parts: Any, make: Any = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, Any]:
    """A network of theirs after some steps of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = parts.line()
    (x, y), _ = parts.waves()
    optimizer = make(model.parameters(), **options)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def sharpest(parts: Any, model: nn.Module) -> float:
    """λ_max by torch's own double backward."""
    (x, y), _ = parts.waves()
    return largest(model, lambda model: nn.functional.mse_loss(model(x), y))


def test_a_registered_network_is_measured_by_its_run(parts):
    model, optimizer = trained(parts, lr=0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = lsa.register(model, **NAMED, optimizer=optimizer, seed=3, batch_size=20)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert step.checkpoint == "models:/tiny.theirs/1"
    found = lsa.load(step.run_id, device="cpu", trust=[NAME])
    assert torch.equal(found.theta, flatten(model)) and found.recipe.seed == 3
    done = lsa.measure("lanczos", found, k=1, density_probes=0)
    assert done["lambda_max"].value == pytest.approx(sharpest(parts, model), rel=1e-4)
    live = lsa.Landscape(model, *parts.waves()[0], nn.MSELoss())
    own = lsa.measure("preconditioned", found, k=1)
    from lsa.probe import find

    result = find("preconditioned")(
        landscape=live, theta=flatten(model), optimizer=optimizer, k=1, batch_size=20
    )
    for name in ("threshold_ratio", "update_curvature", "batch_sharpness"):
        expected = result.metrics[name].value
        assert own[name].value == pytest.approx(expected, rel=1e-3)
    assert step["train_loss"].value == pytest.approx(live.loss(flatten(model)))
    assert not any("accuracy" in name for name in step.metrics)
    again = lsa.register(model, **NAMED, optimizer=optimizer, seed=3, batch_size=20)
    assert again.reused and again.run_id == step.run_id


def test_nobodys_code_runs_unless_named_or_trusted(parts):
    step = lsa.register(trained(parts, lr=0.01)[0], **NAMED)
    with pytest.raises(InputError, match=f"package '{NAME}', which is not trusted"):
        _ = lsa.load(step.run_id, device="cpu").landscape
    found = lsa.load(step.run_id, device="cpu", trust=[NAME])
    with pytest.raises(InputError, match="registered without its optimizer"):
        _ = found.optimizer
    without = lsa.measure("gradient", found)  # a probe that can do without
    assert "gradient_norm" in without.metrics and "update_angle" not in without.metrics
    assert any("no update_angle" in note for note in without.notes)
    with pytest.raises(InputError, match="registered without its optimizer"):
        lsa.measure("preconditioned", found)
    with pytest.raises(InputError, match="its initial weights are not known"):
        _ = found.theta_init


def test_a_factory_that_makes_another_network_is_refused(parts):
    model, _ = trained(parts, lr=0.01)
    with pytest.raises(InputError, match="gives other outputs"):
        lsa.register(model, **NAMED | {"factory": {"name": f"{NAME}:line", "act": "relu"}})
    with pytest.raises(InputError, match=r"has the shape .* give the factory, with the options"):
        lsa.register(model, **NAMED | {"factory": {"name": f"{NAME}:line", "width": 9}})
    with pytest.raises(InputError, match="project='a b' must"):
        lsa.register(model, **NAMED | {"project": "a b"})
    assert not mlflow.search_runs(search_all_experiments=True, output_format="list")


@pytest.mark.parametrize("kind", ["a.pt", "a.safetensors", "a.ckpt", "folder", "mlflow"])
def test_each_kind_of_file_is_adopted(parts, workplace: Path, kind):
    model, optimizer = trained(parts, lr=0.01)
    source = str(workplace / kind)
    if kind == "a.pt":
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    elif kind == "a.safetensors":
        save_file(model.state_dict(), source)
    elif kind == "a.ckpt":
        named = {f"net.{name}": value for name, value in model.state_dict().items()}
        states = [optimizer.state_dict()]
        torch.save({"state_dict": named, "optimizer_states": states, "epoch": 7}, source)
    elif kind == "folder":
        (workplace / kind).mkdir()
        save_file(model.state_dict(), workplace / kind / "model.safetensors")
    else:
        with mlflow.start_run():
            example = torch.zeros(2, 1).numpy()
            mlflow.pytorch.log_model(
                model,
                name="m",
                registered_model_name="m",
                input_example=example,
                serialization_format="pt2",  # the default of newer MLflow
                pip_requirements=["torch"],  # else a process imports all to find them
            )
        source = "models:/m/1"
    rule = {"name": "AdamW", "lr": 0.01} if kind in ("a.pt", "a.ckpt") else None
    step = lsa.adopt(source, **NAMED, rule=rule)
    found = lsa.load(step.run_id, device="cpu", trust=[NAME])
    assert torch.equal(found.theta, flatten(model))
    assert found.epoch == (7 if kind == "a.ckpt" else 0)
    if rule:
        P = found.optimizer.preconditioner(found.theta)
        assert P is not None and torch.isfinite(P.diagonal).all()


class Averaging(torch.optim.SGD):
    """A stand-in for schedule-free: evaluated one unit away from where it steps."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, lr=lr)
        self.param_groups[0]["train_mode"] = True

    def train(self) -> None:
        self._move(True, -1.0)

    def eval(self) -> None:
        self._move(False, 1.0)

    @torch.no_grad()
    def _move(self, mode: bool, by: float) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(by)
        self.param_groups[0]["train_mode"] = mode


def test_weights_of_another_precision_than_the_data_are_refused(parts, workplace: Path):
    model, _ = trained(parts, lr=0.01)
    torch.save(model.half().state_dict(), workplace / "half.pt")
    with pytest.raises(InputError, match=r"the weights are torch\.float16") as caught:
        lsa.adopt(str(workplace / "half.pt"), **NAMED)
    assert "\n" not in str(caught.value)


def test_weights_are_registered_where_they_are_evaluated(parts):
    model, optimizer = trained(parts, Averaging)
    before = flatten(model)
    step = lsa.register(model, **NAMED, optimizer=optimizer)
    assert torch.equal(flatten(model), before) and optimizer.param_groups[0]["train_mode"]
    found = lsa.load(step.run_id, device="cpu", trust=[NAME])
    torch.testing.assert_close(found.theta, before + 1)


def test_a_study_measures_trainings_of_other_code_beside_its_own(parts, workplace: Path):
    model, _ = trained(parts, lr=0.01)
    step = lsa.register(model, **NAMED, seed=3)
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(study(step.run_id, seeds=[3]))
    setting = project.load("tiny")
    states = {one.planned.label: one.state for one in plan.outlook(setting, device="cpu")}
    assert states["train theirs seed 3"] == "reused" and states["train sgd seed 3"] == "new"
    with lsa.study(setting, device="cpu") as running:
        plan.run(setting, running)
    assert all(handle.state in ("done", "reused") for handle in running.handles)
    measured = {handle.call.label: handle for handle in running.handles}
    numbers = measured["lanczos theirs seed 3"].result.metrics
    assert numbers["lambda_max"].value == pytest.approx(sharpest(parts, model), rel=1e-4)
    assert "barrier" in measured["interpolation sgd – theirs seed 3"].result.metrics
    with pytest.raises(InputError, match=r"tiny.theirs was trained elsewhere, so lr cannot"):
        lsa.step("train", optimizer="theirs", project="tiny", lr=0.1)
    with pytest.raises(InputError, match=r"tiny.theirs was trained elsewhere; choose"):
        train_step.train(setting.recipe("theirs"))
    file.write_text(study(step.run_id, step.run_id, seeds=[3]))
    with pytest.raises(InputError, match=r"one run ID or address for each of the seeds \[3\]"):
        project.load("tiny")
    file.write_text(study(step.run_id, seeds=[4]))
    with pytest.raises(InputError, match=r"registered as tiny.theirs seed 3; register it as"):
        plan.outlook(project.load("tiny"), device="cpu")


def test_two_registered_checkpoints_are_joined_by_a_line(parts):
    sources = []
    for seed, lr in ((0, 0.01), (1, 0.1)):
        step = lsa.register(trained(parts, lr=lr)[0], **NAMED, seed=seed)
        sources.append(lsa.load(step.run_id, device="cpu", trust=[NAME]))
    done = lsa.measure("interpolation", *sources, points=5)
    at = Landscape(sources[0].model, *parts.waves()[0], nn.MSELoss())
    middle = at.loss((sources[0].theta + sources[1].theta) / 2)
    assert done.curves["train_loss"].y[2] == pytest.approx(middle, rel=1e-4)
    assert registered.training(f"models:/{sources[0].model_id}") == sources[0].run_id


def test_the_shell_adopts_a_file_and_measures_it_by_its_run(parts, workplace: Path, capsys):
    model, _ = trained(parts, lr=0.01)
    torch.save(model.state_dict(), workplace / "a.pt")
    named = ["--data", f"{NAME}:waves", "--loss", "MSELoss", "--project", "tiny"]
    factory = ["--factory", f"{{name: '{NAME}:line', width: 8}}"]
    assert app.run(["adopt", "a.pt", *factory, *named, "--samples", "all"]) == 0
    run = capsys.readouterr().out.split()[1]
    measured = ["lanczos", "--checkpoint", run, "--k", "1", "--density-probes", "0"]
    assert app.run(measured) == 2
    assert "allow it with --trust" in capsys.readouterr().err
    assert app.run([*measured, "--trust", NAME]) == 0
    found = printed(capsys.readouterr().out)
    assert found == pytest.approx(sharpest(parts, model), rel=1e-4)
    wide = ["--factory", f"{{name: '{NAME}:line', width: 9}}"]
    for arguments, message in (
        (["adopt", "b.pt", *factory, *named], "there is no file b.pt"),
        (["adopt", "a.pt", "--factory", "{name", *named], "not readable YAML"),
        (["adopt", "a.pt", "--factory", f"{NAME}:nothing", *named], "no class or function"),
        (["adopt", "models:/none/1", *factory, *named], "no checkpoint at models:/none/1"),
        (["adopt", "a.pt", *wide, *named], "'0.weight' has the shape (8, 1), and the factory's"),
        (["adopt", "a.pt", *factory, *named, "--epoch", "-5"], "epoch=-5 must be a whole number"),
        (["adopt", "a.pt", *factory, *named, "--rule", "AdamWW"], "unknown optimizer 'AdamWW'"),
        (["adopt", "a.pt", *factory, *named, "--rule", "{name: SGD, lrr: 1}"], "no option 'lrr'"),
        (["adopt", "a.pt", *factory, *named, "--samples", "many"], "landscape.samples='many' must"),
    ):
        assert app.run(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error


def test_a_module_in_the_current_folder_is_found_without_being_on_the_path(workplace: Path):
    (workplace / "beside_me.py").write_text(PARTS)
    before = list(sys.path)
    sys.path[:] = [folder for folder in before if folder not in ("", str(workplace))]
    try:
        split = data.load("beside_me:waves", trusted=["beside_me"])
        assert len(split.x_train) == 60 and str(workplace) not in sys.path
    finally:
        sys.path[:] = before
        sys.modules.pop("beside_me", None)


TOKENS = f"""{SOURCE}
from lsa import Terms

def per_label(model, batch):
    outputs, labels = model(batch["input_ids"]), batch["labels"]
    each = nn.functional.cross_entropy(
        outputs.transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    sums, weights = each.sum(1), (labels != -100).sum(1)
    return Terms(sums.sum(), weights.sum(), sums, weights, outputs=outputs)
"""


def test_batches_and_an_objective_of_ones_own_are_measured(workplace, monkeypatch):
    (workplace / "tokens_of_theirs.py").write_text(TOKENS)
    monkeypatch.syspath_prepend(str(workplace))
    theirs = __import__("tokens_of_theirs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = theirs.Model(width=3)
    pkg = "tokens_of_theirs"
    named = {"data": f"{pkg}:texts", "objective": f"{pkg}:per_label", "project": "tokens"}
    with pytest.raises(InputError, match="no class or function"):
        lsa.register(model, factory=f"{pkg}:Missing", **named)
    factory = {"name": f"{pkg}:Model", "width": 3}
    step = lsa.register(model, factory=factory, **named, samples="all")
    found = lsa.load(step.run_id, device="cpu", trust=[pkg])
    done = lsa.measure("lanczos", found, k=1, density_probes=0)
    ids, labels = (torch.cat([b[k] for b in theirs.texts()[0]]) for k in ("input_ids", "labels"))

    def loss(model: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(ids).transpose(1, 2), labels, ignore_index=-100)

    assert done["lambda_max"].value == pytest.approx(largest(model, loss), rel=1e-4)
    assert step["train_loss"].value == pytest.approx(loss(model).item(), rel=1e-5)
    for name in ("layers", "sgd_noise", "sharpness"):
        assert lsa.measure(name, found).metrics
    with pytest.raises(InputError, match="not trusted"):
        _ = lsa.load(step.run_id, device="cpu").landscape
    sys.modules.pop(pkg, None)


TEXT = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

def make():
    sizes = {"vocab_size": 17, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

def batches():
    made = []
    for i, n in enumerate((3, 4)):
        ids = torch.randint(0, 17, (n, 9), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[0, 4:] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made, made[:1]
"""


@pytest.mark.models
@pytest.mark.full
def test_a_folder_of_hugging_face_is_adopted_with_its_tied_weights(workplace: Path, monkeypatch):
    pytest.importorskip("transformers")
    (workplace / "text_of_theirs.py").write_text(TEXT)
    monkeypatch.syspath_prepend(str(workplace))
    theirs = __import__("text_of_theirs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = theirs.make().eval()
    model.save_pretrained("gpt")
    named = {"data": "text_of_theirs:batches", "objective": "hf", "project": "text"}
    step = lsa.adopt("gpt", factory="text_of_theirs:make", **named, samples="all")
    loss, weight = torch.zeros(()), 0
    for batch in theirs.batches()[0]:
        counted = int((batch["labels"][:, 1:] != -100).sum())
        loss, weight = loss + counted * model(**batch).loss, weight + counted
    (loss / weight).backward()
    assert step["train_loss"].value == pytest.approx(loss.item() / weight, rel=1e-5)
    found = lsa.load(step.run_id, device="cpu", trust=["text_of_theirs"])
    assert torch.equal(found.theta, flatten(model)), "tied weights count once"
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    gradient = found.landscape.gradient(found.theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    sys.modules.pop("text_of_theirs", None)

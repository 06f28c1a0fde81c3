"""The examples do what they say, in processes and folders of their own."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lsa.landscape import flatten

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def ran(folder: Path, *command: str, path: str = "") -> str:
    """What a Python command printed, run in a folder with a store of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT)]))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def example(capsys, monkeypatch):
    """Runs an example here; its names afterwards, and what it printed."""

    def run(name: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return vars(module) | {"printed": capsys.readouterr().out}

    return run


def test_two_live_optimizers_are_told_their_distance_from_the_edge(example):
    ran = example("own_optimizer")
    assert len((EXAMPLES / "own_optimizer.py").read_text().splitlines()) <= 30
    names, ratios = zip(*(line.split() for line in ran["printed"].splitlines()), strict=True)
    assert names == ("AdamW", "Halved") and all(0 < float(ratio) < 10 for ratio in ratios)
    # Of SGD with half the rate: 2/η is the edge, and λ_max lies so far below it.
    sharpest = ran["result"].metrics["lambda_max_raw"].value
    assert float(ratios[1]) == pytest.approx(sharpest * 0.05 / 2, rel=1e-2)


@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_a_network_of_ones_own_loop_is_registered_and_measured(workplace, monkeypatch, capsys):
    import runpy
    import shutil

    assert len((EXAMPLES / "own_checkpoint.py").read_text().splitlines()) <= 30
    shutil.copy(EXAMPLES / "own_checkpoint.py", workplace)
    with torch.random.fork_rng():
        ran = runpy.run_path(str(workplace / "own_checkpoint.py"), run_name="__main__")
    model, loss = ran["model"], torch.nn.functional.mse_loss
    names, sizes = zip(*((n, p.numel()) for n, p in model.named_parameters()), strict=True)

    def of(theta: torch.Tensor) -> torch.Tensor:
        views = map(torch.Tensor.view_as, theta.split(sizes), model.parameters())
        named = dict(zip(names, views, strict=True))
        return loss(torch.func.functional_call(model, named, (ran["x"],)), ran["y"])

    H = torch.autograd.functional.hessian(of, flatten(model)).double()
    printed = float(capsys.readouterr().out.split()[-1])
    assert printed == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-3)
    sys.modules.pop("own_checkpoint", None)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_spectrum_of_your_own_model_is_that_of_its_dense_hessian(example):
    import torch
    from torch.func import functional_call, hessian

    own_model = example("own_model")
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) <= 30
    model, x, y, loss = (own_model[name] for name in ("model", "x", "y", "loss"))
    double = model.double()
    place = {name: p.detach() for name, p in double.named_parameters()}
    sizes = [p.numel() for p in place.values()]

    def value(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(place, flat.split(sizes), strict=True)
        named = {name: part.view(place[name].shape) for name, part in parts}
        return loss(functional_call(double, named, (x.double(),)), y.double())

    dense = hessian(value)(torch.cat([p.reshape(-1) for p in place.values()]))
    eigenvalues = torch.linalg.eigvalsh(dense)
    metrics = own_model["result"].metrics
    assert metrics["lambda_max"].value == pytest.approx(eigenvalues[-1].item(), rel=1e-4)
    assert metrics["lambda_min"].value == pytest.approx(eigenvalues[0].item(), rel=1e-2)
    assert re.search(r"lambda_max +\S+ ± \S+ \(data\) loss", own_model["printed"])


@pytest.mark.full
def test_a_probe_of_your_own_package_is_a_command_like_any_other(tmp_path):
    """Installed as anyone would, and found by its entry point."""
    pytest.importorskip("setuptools", minversion="70.1")
    source = tmp_path / "source"  # building writes beside the source
    source.mkdir()
    for file in (EXAMPLES / "own_probe").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    target = str(tmp_path / "installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    ran(tmp_path, "-m", "pip", "install", *options, str(source))
    lsa = functools.partial(ran, tmp_path, "-m", "lsa", path=target)
    assert "bump " in lsa("probes")
    assert "--radius" in lsa("bump", "--help")
    (tmp_path / "tiny.yaml").write_text(
        "dataset: {name: digits, train_limit: 100, val_limit: 50}\n"
        "model: {name: mlp, hidden: [8]}\n"
        "train: {epochs: 1}\n"
        "optimizers: {sgd: {name: SGD, lr: 0.1}}\n"
        "probes: {bump: {radius: 0.5}}\n"
    )
    checkpoint = ["--project", "tiny.yaml", "--optimizer", "sgd"]
    lsa("train", *checkpoint)
    assert re.search(r"bump/loss_rise .* ± .*\(data\)", lsa("bump", *checkpoint))


@pytest.mark.full
def test_a_model_that_others_registered_is_measured_as_it_was_before_they_did(tmp_path):
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from lsa import Landscape
    from lsa.landscape import flatten
    from lsa.probe import find

    printed = ran(tmp_path, str(EXAMPLES / "foreign_model.py"))
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    landscape = Landscape(network, x, y)
    result = find("lanczos")(landscape=landscape, theta=flatten(network), density_probes=0)
    found = re.search(r"lambda_max (\S+) ± ", printed)
    assert found and float(found[1]) == pytest.approx(result.metrics["lambda_max"].value, rel=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_page_lists_every_example_and_what_it_measures(example):
    page = (ROOT / "docs" / "examples.md").read_text()
    listed = set(re.findall(r"\]\(\.\./examples/([\w.]+)[)/]", page))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.name[0] not in "_."}
    shown = page.split("$ python examples/own_model.py\n")[1].split("```")[0]
    printed = example("own_model")["printed"]
    assert [line.split()[0] for line in shown.splitlines()] == [
        line.split()[0] for line in printed.splitlines()
    ]


def gradient_of(model, loss, x, y):
    """θ ↦ ∇L(θ) by plain torch, in float64; and θ."""
    import torch
    from torch.func import functional_call

    double = model.double().eval()
    named = {name: p.detach() for name, p in double.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def gradient(flat: torch.Tensor, *, again: bool = False) -> torch.Tensor:
        parts = zip(named, flat.split(sizes), strict=True)
        there = {name: part.view(named[name].shape) for name, part in parts}
        value = loss(functional_call(double, there, (x,)), y)
        return torch.autograd.grad(value, flat, create_graph=again)[0]

    return gradient, torch.cat([p.reshape(-1) for p in named.values()])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_top_pair_of_a_resnet_on_an_image_folder_is_that_of_plain_torch(example, tmp_path):
    import torch
    from torchvision.utils import save_image

    assert len((EXAMPLES / "resnet_folder.py").read_text().splitlines()) <= 60
    rng = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / name).mkdir()
        for i in range(4):
            image = 0.3 * torch.rand(3, 40, 40, generator=rng)
            image[channel] += 0.5
            save_image(image, tmp_path / name / f"{i}.png")
    found = example("resnet_folder", str(tmp_path))
    assert found["printed"].startswith("12 images, 11178051 parameters, loss ")
    result = found["result"]
    top = result.metrics["lambda_max"].value
    assert re.search(r"lambda_max +\S+ ± \S+ \(data\) loss", found["printed"])
    loss = torch.nn.functional.cross_entropy
    gradient, theta = gradient_of(found["model"], loss, found["x"].double(), found["y"])
    v = torch.from_numpy(result.arrays["eigenvectors"])[:, 0].double()
    theta.requires_grad_()
    product = torch.autograd.grad(gradient(theta, again=True), theta, v)[0]
    # The residual that Lanczos allows, and float32.
    assert (product - top * v).norm() < 5e-3 * top


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_top_pair_of_a_transformer_is_that_of_differences_of_its_gradient(example):
    import torch

    assert len((EXAMPLES / "transformer_text.py").read_text().splitlines()) <= 60
    found = example("transformer_text")
    assert float(re.search(r"loss (\S+)$", found["printed"], re.MULTILINE)[1]) < 0.5  # it learned
    result = found["result"]
    assert not result.notes
    gradient, theta = gradient_of(found["model"], found["loss"], found["x"], found["y"])
    vectors = torch.from_numpy(result.arrays["eigenvectors"]).double()
    values = result.arrays["eigenvalues"]
    for value, v in zip(values[:2], vectors.T, strict=False):
        ends = [(theta + step * v).requires_grad_() for step in (1e-5, -1e-5)]
        product = (gradient(ends[0]) - gradient(ends[1])) / 2e-5
        assert (product - value * v).norm() < 5e-3 * value


@pytest.mark.full
def test_a_watched_training_draws_both_figures(example, tmp_path):
    names = example("watched_training")
    names["main"](tmp_path, steps=30)
    for name in ("watch-rate.png", "watch-batch.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 200_000

"""Models of other libraries in a project's YAML: trained and measured, against loops by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from torch import Tensor, nn

import lsa
from lsa import project
from lsa.landscape import flatten
from lsa.studies import train as studied
from lsa.training import data
from lsa.training.train import initial

pytestmark = [pytest.mark.models, pytest.mark.full, pytest.mark.filterwarnings("ignore")]

NAME = "timm_of_mine"
SOURCE = """
import timm, torch

def shapes():
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 3
    return (x, y), (x[:6], y[:6])

def vit(depth=1):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=4,
        depth=depth, num_heads=2,
    )
"""
PROJECT = f"""
dataset: {{name: "{NAME}:shapes"}}
model: {{name: "{NAME}:vit", depth: 1}}
train: {{epochs: 1, batch_size: 24}}
optimizers:
  sgd: {{name: SGD, lr: 0.5}}
landscape: {{samples: all}}
"""


def test_a_model_of_timm_is_trained_by_a_project_and_measured(workplace: Path, monkeypatch):
    """An epoch of one batch is one step of gradient descent; λ_max is that of a dense Hessian."""
    pytest.importorskip("timm")
    (workplace / f"{NAME}.py").write_text(SOURCE)
    (workplace / "images.yaml").write_text(PROJECT)
    monkeypatch.syspath_prepend(str(workplace))
    at = project.load("images.yaml").recipe("sgd")
    split = data.load(at.dataset.name, trusted=[NAME])
    done = studied.train(at, trusted=[NAME])

    theirs = __import__(NAME)
    (x, y), _ = theirs.shapes()
    with torch.random.fork_rng():
        model: nn.Module = theirs.vit()
    model.load_state_dict(initial(at, split, [NAME])["model"])
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.5 * p.grad
    found = lsa.load(done.run_id, device="cpu", trust=[NAME])
    torch.testing.assert_close(found.theta, flatten(model), rtol=1e-4, atol=1e-6)
    measured = lsa.lanczos(found.landscape, found.theta, k=1, k_min=1, density_probes=0)
    sys.modules.pop(NAME, None)

    model, images = model.double(), x.double()

    def each(f: nn.Module) -> Tensor:
        return F.cross_entropy(f(images), y, reduction="none")

    landscape = lsa.Landscape(model, images, y)
    agree(landscape, flatten(model), lambda f: each(f).mean(), each, dense=False)
    exact = lsa.lanczos(landscape, k=1, k_min=1, density_probes=0)
    for name in ("lambda_max", "lambda_min", "gradient_norm"):
        assert measured[name].value == pytest.approx(exact[name].value, rel=1e-3), name

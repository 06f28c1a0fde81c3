"""Whatever the caller has set in torch, a step has the same key and the same numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch

import lsa
from lsa import probe, project
from lsa.runtime import modes
from lsa.runtime.errors import InputError
from lsa.studies import train
from lsa.tracking import runs

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
SHORT = {"k": 1, "density_probes": 0, "split": "no"}


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def on_meta():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = [torch.inference_mode, torch.no_grad, float64, on_meta, lambda: torch.device("meta")]


def measured() -> tuple[str, float, float, float]:
    """Key and loss of a training, λ_max of it as a step and by the probe itself."""
    trained = train.train(project.load("tiny").recipe("sgd"), device="cpu")
    source = lsa.load(trained.run_id, device="cpu")
    theta, landscape = source.theta, source.landscape
    step = lsa.measure("lanczos", source, **SHORT)
    alone = probe.find("lanczos")(landscape=landscape, theta=theta, **SHORT)
    loss = trained["val_loss"].value
    top = alone.metrics["lambda_max"].value
    return runs.read(trained.run_id).tags["lsa.key"], loss, step["lambda_max"].value, top


def test_steps_are_the_same_in_every_mode(workplace):
    *expected, alone = measured()
    for mode in MODES:
        with mode():
            *found, top = measured()
        assert found == expected
        assert top == pytest.approx(alone, rel=1e-5)  # whose dtype is the caller's


def test_the_callers_modes_come_back():
    with float64(), torch.inference_mode():
        with modes.usual():
            assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def test_in_inference_mode_probes_measure_and_derivatives_are_refused():
    """There, torch's own gradients are zero without a word."""

    def parts() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(0)
        model = torch.nn.Linear(4, 3)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=rng))
        return model, torch.randn(20, 4, generator=rng), torch.tensor([0, 1, 2, 0] * 5)

    outside = lsa.Landscape(*parts())
    expected = lsa.lanczos(outside, **SHORT)["lambda_max"].value
    with torch.inference_mode():
        model, x, y = parts()
        inside = lsa.Landscape(model, x, y)
        for landscape in (outside, inside, lsa.Landscape(model, [(x, y)])):
            thetas = landscape.theta, landscape.theta * 1.0
            found = [lsa.lanczos(landscape, theta, **SHORT)["lambda_max"].value for theta in thetas]
            assert found == pytest.approx([expected] * 2, rel=1e-5)
            with pytest.raises(InputError, match=r"torch.inference_mode\(\) is on"):
                landscape.gradient(thetas[0])
            with pytest.raises(InputError, match=r"torch.inference_mode\(\) is on"):
                landscape.hessian(thetas[0])(thetas[0])
    theta = inside.theta
    assert torch.equal(inside.gradient(theta), outside.gradient(theta))
    with torch.no_grad():
        assert torch.equal(inside.gradient(theta), outside.gradient(theta))

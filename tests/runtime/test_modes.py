"""Whatever the caller has set in torch, a step has the same key and the same numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch

import lsa
from lsa import probe, project
from lsa.runtime import modes
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

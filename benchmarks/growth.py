"""How time and memory grow with samples, parameters and Lanczos steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import setting
from benchmarks.timing import peak
from lsa.maths.spectra import eigenpairs
from lsa.training import models

SAMPLES = (512, 2048, 8192)
WIDTHS = (64, 128, 256, 512)  # of simple_cnn: 0.18 to 11 million parameters
STEPS = (20, 60, 200)
BASIS = 60  # vectors held by the Lanczos runs
IMAGES = 64  # where parameters or steps grow


def rows(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Per quantity: what grew, how seconds and bytes did, and the fitted exponent of the time."""
    return [*_samples(model, x, y), *_parameters(x, y), *_steps(model, x, y)]


def _samples(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    found = []
    for n in [n for n in SAMPLES if n <= len(x)] or [len(x)]:
        at, theta = setting.landscape(model, x[:n], y[:n])
        found.append((n, *_product(at, theta)))
    return _fitted("samples", found)


def _parameters(x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    found = []
    for width in WIDTHS:
        shape = tuple(x.shape[1:])
        model = models.build("simple_cnn", input_shape=shape, classes=10, seed=0, width=width)
        at, theta = setting.landscape(model, x[:IMAGES], y[:IMAGES])
        found.append((len(theta), *_product(at, theta)))
    return _fitted("parameters", found)


def _steps(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    found = []
    at, theta = setting.landscape(model, x[:IMAGES], y[:IMAGES])
    hessian, rng = at.hessian(theta), torch.Generator().manual_seed(0)
    hessian(theta)  # builds what is kept
    for steps in STEPS:
        start = eigenpairs.start_vector(theta, rng)
        _, seconds, size = peak(
            lambda start=start, steps=steps: eigenpairs.lanczos(
                hessian, start, rng=rng, tol=1e-12, basis=BASIS, max_products=steps
            )
        )
        found.append((steps, seconds, size))
    return _fitted(f"Lanczos steps, basis {BASIS}", found)


def _product(at: Any, theta: Tensor) -> tuple[float, int]:
    """Seconds of a second Hessian product, and the bytes that the first one took."""
    hessian = at.hessian(theta)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    _, _, size = peak(lambda: hessian(v))
    _, seconds, _ = peak(lambda: hessian(v))
    return seconds, size


def _fitted(name: str, found: list[tuple[int, float, int]]) -> list[dict[str, Any]]:
    """Rows of one quantity, with the slope of log seconds against log size by least squares."""
    xs = [math.log(n) for n, _, _ in found]
    ys = [math.log(s) for _, s, _ in found]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((a - mx) ** 2 for a in xs)
    slope = sum((a - mx) * (b - my) for a, b in zip(xs, ys, strict=True)) / spread if spread else 0
    return [
        {"grows": name, "to": f"{n:,}", "seconds": s, "MB": size / 1e6, "exponent": slope}
        for n, s, size in found
    ]

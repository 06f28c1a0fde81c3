"""Language models: a Hessian product over a gradient, in time and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks import gpt
from benchmarks.timing import peak
from lsa.landscape import Landscape, objectives

SIZES = {"0.8M": 4, "10.7M": 4}  # sequences; 124 million parameters by hand: they take hours here
ROUNDS = 5
KEPT = 16 << 30  # bytes: every graph fits


def rows(sizes: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """Per network and way: CPU seconds, and time and added memory over those of a gradient.

    The gradient is that of the network as it trains, with fused attention.
    """
    found = []
    for name, n in (sizes or SIZES).items():
        shape = gpt.SHAPES[name]
        model = gpt.build(shape).eval()
        ids = gpt.text(n, shape.context, shape.vocabulary)
        ways = {
            "gradient": _gradient,
            "exact product, graphs kept": _product,
            "exact product, nothing kept": _product,
            "product from gradients": _product,
        }
        tasks, sizes_held = {}, {}
        for label, make in ways.items():
            at = _landscape(model, ids, label)
            tasks[label] = make(at)
            tasks[label]()  # builds what is kept, and finds the step
            sizes_held[label] = peak(tasks[label])[2]
        seconds = _alternate(tasks)
        for label in ways:
            found.append(
                {
                    "network": f"GPT {name}, {n} × {shape.context} tokens",
                    "what": label,
                    "CPU seconds": seconds[label],
                    "gradients": seconds[label] / seconds["gradient"],
                    "MB added": sizes_held[label] / 1e6,
                }
            )
    return found


def _landscape(model: gpt.GPT, ids: torch.Tensor, label: str) -> Landscape:
    exact = label.startswith("exact")
    return Landscape(
        model,
        [ids],
        objective=objectives.per_token(),
        copy=False,
        memory=KEPT if label.endswith("graphs kept") else 0,
        products="exact" if exact else "gradients",
    )


def _gradient(at: Landscape) -> Callable[[], Any]:
    theta = at.theta
    return lambda: at.gradient(theta)


def _product(at: Landscape) -> Callable[[], Any]:
    theta = at.theta
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0))
    product = at.hessian(theta)
    return lambda: product(v)


def _alternate(tasks: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU seconds of each task over rounds that run all in turn."""
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            began = time.process_time()
            task()
            took[name].append(time.process_time() - began)
    return {name: median(seconds) for name, seconds in took.items()}

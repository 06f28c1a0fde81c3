"""What `lsa.watch` costs a training, and hooks that take histograms of gradients beside it.

Every kind of training makes a few steps in turn, and the time of a step is the median over the
rounds: CPU time, or seconds until a GPU has done. A measurement that is not made at every step has
a price in steps of the training.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa
from benchmarks import summary
from benchmarks.gpt import GPT, SHAPES
from lsa.training import models

BATCH = 128
SEQUENCES, CONTEXT = 8, 128  # of the GPT
ROUNDS = {"mlp": 15, "simple_cnn": 5, "resnet20": 3, "gpt": 3}
STEPS = {"mlp": 40, "simple_cnn": 4, "resnet20": 2, "gpt": 1}  # of a round
BINS = 64

Step = Callable[[], None]


def rows(x: Tensor, y: Tensor, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Per network and way of watching: time of a step over that of the bare training.

    Args:
        x: Images.
        y: Their classes.
        names: Of networks, of `STEPS`; default all.
    """
    found = []
    for name in names or STEPS:
        found += (own := _of_network(name, x, y))
        print(summary.table(own), flush=True)
    return [*found, {**dict.fromkeys(found[0], ""), "network": "any", "watched": cockpit()}]


def cockpit() -> str:
    """What becomes of cockpit, the other tool that measures inside of a training."""
    try:
        importlib.import_module("cockpit")
    except ImportError as error:
        return f"cockpit: does not import ({error})"
    return "cockpit: imports, is not measured here"


def _of_network(name: str, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    alone = {"budget": None, "track": False}
    kinds = ("update", "noise", "sharpness", "batch_sharpness")
    samples = {"measure": ["noise_of_samples"], "every": 1, "norms": 10**9}
    ways: dict[str, Callable[..., Any]] = {
        "bare": lambda model, optimizer, probe: None,
        "norms, every step": lambda m, o, _: lsa.watch(m, o, **alone),
        "histograms of gradients, every step": lambda model, *_: histograms(model),
        "noise_of_samples": lambda m, o, _: lsa.watch(m, o, **samples, **alone),
    }
    if name == "resnet20":  # its batch norm mixes the samples
        del ways["noise_of_samples"]
    for kind in kinds:
        ways[kind] = lambda m, o, p, kind=kind: lsa.watch(
            m, o, every=1, norms=10**9, measure=[kind], **alone, **p
        )
    for kind in ("update", "sharpness"):
        ways[f"{kind}, half as many samples"] = lambda m, o, p, kind=kind: lsa.watch(
            m, o, every=1, norms=10**9, measure=[kind], **alone, **_halved(p)
        )
    trainings = {way: _training(name, x, y, attach) for way, attach in ways.items()}
    took: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(ROUNDS[name] + 1):  # the first warms up
        for way, step in trainings.items():
            number = STEPS[name] if way in ("bare", "norms, every step") else 1
            began = _seconds(x.device)
            for _ in range(number):
                step()
            if round_:
                took[way].append((_seconds(x.device) - began) / number)
    bare = statistics.median(took["bare"])
    found = []
    for way, seconds in took.items():
        ratios = [s / b for s, b in zip(seconds, took["bare"], strict=True)]
        ratio = statistics.median(seconds) / bare
        found.append(
            {
                "network": name,
                "watched": way,
                "step, ms": 1e3 * statistics.median(seconds),
                "step / bare step": ratio,
                "smallest and largest": f"{min(ratios):.3g} to {max(ratios):.3g}",
                "price of a measurement, steps": ratio - 1,
                "at every 100 steps": f"{(ratio - 1) / 100:.2%}",
            }
        )
    return found


def _halved(probe: dict[str, Any]) -> dict[str, Any]:
    """The same with half of each batch."""
    return {**probe, "batches": [tuple(t[: len(t) // 2] for t in b) for b in probe["batches"]]}


def _seconds(device: torch.device) -> float:
    """A clock: of this process, or of everything once a GPU has done what it was told."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def histograms(model: nn.Module) -> None:
    """A histogram of every gradient as it is made, the way trackers' gradient hooks take them."""

    def take(gradient: Tensor) -> None:
        flat = gradient.detach().reshape(-1)
        flat = flat[torch.isfinite(flat)]
        low, high = flat.min().item(), flat.max().item()
        torch.histc(flat, bins=BINS, min=low, max=high).tolist()

    for parameter in model.parameters():
        parameter.register_hook(take)


def _training(name: str, x: Tensor, y: Tensor, attach: Callable[..., Any]) -> Step:
    """A step of a training of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gpt":
            model: nn.Module = GPT(SHAPES["10.7M"])
            ids = torch.randint(128, (SEQUENCES, CONTEXT + 1)).to(x.device)
            inputs, targets = ids[:, :-1], ids[:, 1:]
        else:
            shape, classes = tuple(x.shape[1:]), int(y.max()) + 1
            model = models.build(name, input_shape=shape, classes=classes, seed=0)
            inputs, targets = x[:BATCH], y[:BATCH]

    model.to(x.device)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    def sequences(network: nn.Module, batch: Any) -> lsa.Terms:
        each = F.cross_entropy(network(batch[0]).transpose(1, 2), batch[1], reduction="none")
        return lsa.Terms(
            each.sum(), each.numel(), each.sum(1), each.new_full((len(each),), CONTEXT)
        )

    half = inputs[: len(inputs) // 2], targets[: len(inputs) // 2]
    probe: dict[str, Any] = {"batches": [half]}
    if name == "gpt":
        probe["objective"] = sequences
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    attach(model, optimizer, probe)
    of = loss if name == "gpt" else F.cross_entropy

    def step() -> None:
        optimizer.zero_grad()
        of(model(inputs), targets).backward()
        optimizer.step()

    return step

"""`python -m benchmarks.watched_trainings`: the time of a watched training over that of a bare one.

    python -m benchmarks.watched_trainings mlp --ways "norms;usual;usual, tracked" --rounds 400

Copies of one training, with equal weights and data, take turns in one process: each makes a few
steps, in an order that is drawn anew for every round. One copy more without a watch is the control.
The time is CPU time of the loop's thread, and of the one that sends. Steps in which the watch did
next to nothing are compared by their medians, which a busy machine does not move; what the others
took beyond that is added. Clocks of a watch stand still while the others train.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa
from benchmarks import gpt, setting
from benchmarks.machine import described
from benchmarks.summary import table
from lsa.tracking.stream import Stream
from lsa.training import models
from lsa.watching.budget import Budget

SIZES = {"mlp": 128, "simple_cnn": 128, "resnet20": 128, "gpt": 8}  # of a batch
CONTEXT = 128  # tokens of a sequence
SAMPLES = 8192  # images that a training draws from
NOISE, WRONG = 0.3, 0.1  # on their pixels; share of labels that are drawn, so the loss stays
EVERY = 100
DRAWN = 1000  # times that rounds are drawn for an interval
IDLE = 0.02  # of a step, that a watch takes in a step in which it does next to nothing

PROBED = {"probe": True, "budget": None}
WAYS: dict[str, dict[str, Any]] = {
    "control": {},
    "norms": {"budget": None},
    "update": {**PROBED, "norms": 10**9, "measure": ["update"]},
    "noise": {**PROBED, "norms": 10**9, "measure": ["noise"]},
    "noise_of_samples": {"budget": None, "norms": 10**9, "measure": ["noise_of_samples"]},
    "sharpness": {**PROBED, "norms": 10**9, "measure": ["sharpness"]},
    "usual, no budget": PROBED,
    "usual": {"probe": True},
    "usual, tracked": {"probe": True, "track": True},
    "usual, no budget, tracked": {**PROBED, "track": True},
    "norms, tracked": {"budget": None, "track": True},
    "norms in budget": {},
    "norms in budget, tracked": {"track": True},
    "all in budget": {"probe": True, "measure": ["update", "noise", "sharpness"]},
    "all, no budget": {**PROBED, "measure": ["update", "noise", "sharpness"]},
}


class Made(NamedTuple):
    """Seconds of a step."""

    cpu: float  # of the loop's thread
    own: float  # of the watch, as its clock says
    sent: float  # CPU time of the thread that sends


class Training:
    """A training of its own, with equal weights and data in every copy.

    Args:
        network: Its name.
        way: How it is watched; None: it is not.
        every: Steps between measurements on the probe set.
        size: Of a batch; default that of `SIZES`.
    """

    def __init__(
        self, network: str, way: Mapping[str, Any] | None, every: int, size: int | None = None
    ) -> None:
        self._data, self._objective = _data(network), None
        if network == "gpt":
            self._model: nn.Module = gpt.build(gpt.SHAPES["10.7M"])
            self._objective = _sequences
        else:
            shape = tuple(self._data[0].shape[1:])
            self._model = models.build(network, input_shape=shape, classes=10, seed=0)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._size = size or SIZES[network]
        self._step = 0
        self.watch = None if way is None else self._watched(dict(way), every)
        self._budget = self.watch._budget if self.watch else Budget(None)
        self._left, self._known = time.perf_counter(), 0.0

    def _watched(self, way: dict[str, Any], every: int) -> Any:
        if way.pop("probe", False):
            half = self._size // 2
            way["batches"] = [tuple(t[:half] for t in self._data)]
            if self._objective:
                way["objective"] = self._objective
        return lsa.watch(self._model, self._optimizer, every=every, **{"track": False, **way})

    def block(self, steps: int) -> list[Made]:
        """Make some steps."""
        budget = self._budget
        if budget._began is not None:
            budget._began += time.perf_counter() - self._left
        made = []
        for _ in range(steps):
            own, cpu = self._own(), time.thread_time()
            self._make_step()
            took, sent = time.thread_time() - cpu, self._sent()
            made.append(Made(took, self._own() - own, sent - self._known))
            self._known = sent
        self._left = time.perf_counter()
        return made

    def _own(self) -> float:
        """Seconds of the watch, without those of the thread that sends."""
        return self._budget.spent - self.watch._outputs._counted if self.watch else 0.0

    def _sent(self) -> float:
        """Seconds of the thread that sends."""
        stream = self.watch and self.watch._outputs._stream
        return stream.seconds if stream else 0.0

    def _make_step(self) -> None:
        start = self._step * self._size % len(self._data[0])
        x, y = (t[start : start + self._size] for t in self._data)
        self._optimizer.zero_grad()
        F.cross_entropy(self._model(x).flatten(0, -2), y.flatten()).backward()
        self._optimizer.step()
        self._step += 1


@functools.cache
def _data(network: str) -> tuple[Tensor, Tensor]:
    if network == "gpt":
        ids = gpt.text(512, CONTEXT + 1)
        return ids[:, :-1], ids[:, 1:]
    rng = torch.Generator().manual_seed(0)
    x, y = setting.images(None, SAMPLES)
    drawn = torch.randint(10, y.shape, generator=rng)
    y = torch.where(torch.rand(len(y), generator=rng) < WRONG, drawn, y)
    return x + NOISE * torch.randn(x.shape, generator=rng), y


def _sequences(network: nn.Module, batch: Any) -> lsa.Terms:
    each = F.cross_entropy(network(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return lsa.Terms(each.sum(), each.numel(), each.sum(1), each.new_full((len(each),), CONTEXT))


def excess(watched: Tensor, own: Tensor, bare: Tensor) -> Tensor:
    """Time of watched steps over that of bare ones, less 1: `(n,)`, of n drawings of rounds.

    Args:
        watched: Seconds of steps, `(n, steps)`.
        own: What the watch took of them.
        bare: Seconds of bare steps, `(n, steps)`.
    """
    usual = bare.median(1, keepdim=True).values
    idle = own < IDLE * usual
    idly = torch.where(idle, watched, torch.nan).nanmedian(1, keepdim=True).values
    ratios = torch.where(idle, idly / usual, watched / bare.mean(1, keepdim=True))
    return ratios.mean(1) - 1


def _interval(rounds: Tensor) -> tuple[float, float, float]:
    """The excess, with its 95 % interval by drawing rounds, of seconds `(3, rounds, steps)`."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(rounds.shape[1], (DRAWN, rounds.shape[1]), generator=rng)
    found = torch.cat([excess(*rounds[:, some].flatten(2)) for some in drawn.split(100)])
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975]).double()).tolist()
    return float(excess(*rounds.flatten(1)[:, None])), low, high


def rows(
    network: str,
    ways: Sequence[str],
    *,
    steps: int,
    rounds: int,
    every: int,
    warm: int,
    size: int | None = None,
    minutes: float = math.inf,
) -> list[dict[str, Any]]:
    """Per way: time of the watched training over that of the bare one.

    Args:
        network: `mlp`, `simple_cnn`, `resnet20` or `gpt`.
        ways: Of `WAYS`.
        steps: Of a block.
        rounds: Blocks of each training.
        every: Steps between measurements on the probe set.
        warm: Rounds before, which do not count.
        size: Of a batch.
        minutes: After which no more rounds begin.
    """
    trainings = {"bare": Training(network, None, every, size)}
    for way in ("control", *(w for w in ways if w != "control")):
        how = None if way == "control" else WAYS[way]
        trainings[way] = Training(network, how, every, size)
    pause = Stream._pause  # of time that is its training's
    Stream._pause = lambda self: pause(self) * len(trainings)
    took: dict[str, list[list[Made]]] = {name: [] for name in trainings}
    order, rng = list(trainings), random.Random(0)
    end = time.monotonic() + 60 * minutes
    for round_ in range(warm + rounds):
        rng.shuffle(order)
        for name in order:
            made = trainings[name].block(steps)
            if round_ >= warm:
                took[name].append(made)
        if time.monotonic() > end:
            break
    found = [
        {"network": network, "watched": name}
        | _compared(torch.tensor(made), torch.tensor(took["bare"]), trainings[name].watch)
        for name, made in took.items()
        if name != "bare"
    ]
    for training in trainings.values():
        if training.watch is not None:
            training.watch.close()
    return found


def _compared(made: Tensor, bare: Tensor, watch: Any) -> dict[str, Any]:
    """Figures of a watched training, from seconds `(rounds, steps, 3)`."""
    made, bare = made.double(), bare.double()[..., 0]
    steps, usual = bare.numel(), float(bare.median())
    ratio, low, high = _interval(torch.stack([made[..., 0], made[..., 1], bare]))
    sent = float(made[..., 2].sum()) / (steps * usual)
    return {
        "steps": steps,
        "bare step, ms": 1e3 * usual,
        "loop": f"{ratio:+.2%}",
        "95 %": f"{low:+.2%} to {high:+.2%}",
        "sending": f"{sent:.2%}",
        "sum": f"{ratio + sent:+.2%}",
        "its own clock": f"{float(made[..., 1].sum()) / (steps * usual):.2%}",
        "sums of seconds": f"{float(made[..., 0].sum() / bare.sum()) - 1:+.2%}",
        "overhead": "" if watch is None else f"{watch._budget.overhead:.2%}",
        "measured": "" if watch is None else _counts(watch, watch.step - steps),
        "seconds": {"made": made.tolist(), "bare": bare.tolist()},
    }


def _counts(watch: Any, after: int) -> str:
    """How often norms, the update, noise and sharpness were measured."""
    names = "gradient_norm", "probe_loss", "noise_trace", "sharpness"
    return " ".join(str(sum(s > after for s in watch._history.column(n)[0])) for n in names)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.watched_trainings", description=__doc__
    )
    parser.add_argument("network", choices=["mlp", "simple_cnn", "resnet20", "gpt"])
    parser.add_argument("--ways", default="norms;usual, no budget;usual;all, no budget")
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--warm", type=int, default=20, help="rounds before")
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--size", type=int, help="of a batch")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most")
    parser.add_argument("--json", type=Path, help="seconds of all blocks")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    out = chosen.json and chosen.json.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        kept = {"steps": chosen.steps, "rounds": chosen.rounds, "every": chosen.every}
        kept |= {"size": chosen.size, "minutes": chosen.minutes}
        found = rows(chosen.network, chosen.ways.split(";"), **kept, warm=chosen.warm)
        os.chdir("/")
    if out:
        out.write_text(json.dumps(found))
    print(described("cpu"), kept)
    print(table([{k: v for k, v in row.items() if k != "seconds"} for row in found]))


if __name__ == "__main__":
    main()

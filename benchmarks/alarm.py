"""`python -m benchmarks.alarm`: what an alarm is worth, on small trainings, spiking and calm.

Each training is watched at every fourth step and ends with its numbers in a file. A rule is made on
the trainings of some seeds and widths, and judged on others.

    python -m benchmarks.alarm run FOLDER        # train and record, minutes
    python -m benchmarks.alarm judge FOLDER      # choose the rules' levels, then count
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lsa
from benchmarks.summary import table

STEPS = 200
EVERY = 4
BEFORE = 30  # steps: an alarm so long before a spike counts as a warning of it
QUIET = 20  # steps after an alarm in which a further one is the same
MEMORY = 20  # steps whose median loss a spike is compared with
BACK = 0.25  # a spike: the loss of three steps is so far from that back to the first three's


class Setting(NamedTuple):
    """One training."""

    model: str  # mlp, cnn or gpt
    optimizer: str  # sgd or adamw
    course: str  # calm, ramp (rate + 3 % a step), high (12 times the rate), or batch (bad data)
    width: int
    seed: int


def settings(made: bool) -> Iterator[Setting]:
    """Trainings on which the rules are made, or those on which they are judged."""
    widths, seeds = ((32, 64), (0,)) if made else ((24, 48, 80), (10,))
    kinds = itertools.product(("mlp", "cnn", "gpt"), ("sgd", "adamw"))
    for (model, optimizer), width, seed in itertools.product(kinds, widths, seeds):
        courses = ("calm", "ramp") if made else ("calm", "ramp", "high", "batch")
        if model == "gpt" and width > 48:  # which takes longest
            continue
        for course in courses:
            yield Setting(model, optimizer, course, width, seed)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.heads = nn.Linear(width, 3 * width), heads
        self.out = nn.Linear(width, width)
        self.rest = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, w = x.shape
        q, k, v = self.mix(self.first(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, t, w))
        return x + self.rest(self.second(x))


class GPT(nn.Module):
    """A small causal transformer over bytes."""

    def __init__(self, width: int, layers: int = 1, context: int = 24, symbols: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.blocks(self.token(ids) + self.place[: ids.shape[1]])))
        return logits.transpose(1, 2)


def text() -> torch.Tensor:
    """Source code of the standard library, as bytes below 128."""
    files = [Path(m.__file__) for m in (argparse, json, statistics)]
    return torch.tensor([b for f in files for b in f.read_bytes() if b < 128])


def data(model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    if model == "gpt":
        rows = text().unfold(0, 25, 16)
        return rows[:, :-1], rows[:, 1:]
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x).float() / 16
    return (x.view(-1, 1, 8, 8) if model == "cnn" else x), torch.tensor(y)


def network(model: str, width: int) -> nn.Module:
    """An untrained network."""
    if model == "gpt":
        return GPT(width)
    if model == "mlp":
        return nn.Sequential(
            nn.Linear(64, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )
    return nn.Sequential(
        nn.Conv2d(1, width // 4, 3), nn.ReLU(), nn.Conv2d(width // 4, width // 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(width // 4 * 16, 10),
    )  # fmt: skip


CALM = {
    "sgd": {"mlp": 0.05, "cnn": 0.02, "gpt": 0.05},
    "adamw": {"mlp": 2e-3, "cnn": 2e-3, "gpt": 2e-3},
}


def rate(at: Setting, step: int) -> float:
    """Learning rate of a step."""
    base = CALM[at.optimizer][at.model] * min(1.0, (step + 1) / 20)
    if at.course == "ramp":
        return base * 1.03 ** max(0, step - 60)
    if at.course == "high":  # from a random step on, by a factor
        rng = torch.Generator().manual_seed(at.seed + at.width)
        start = int(torch.randint(80, 150, (), generator=rng))
        return base * (12.0 if step >= start else 1.0)
    return base * 0.5 * (1 + math.cos(math.pi * step / STEPS)) if step > 20 else base


def trained(at: Setting) -> dict[str, Any]:
    """One training, watched: its losses and what the watch has measured."""
    torch.manual_seed(1000 * at.seed + at.width)
    model, (x, y) = network(at.model, at.width), data(at.model)
    order = torch.randperm(len(x))
    n = 48 if at.model == "gpt" else 192
    probe, rest = order[:n], order[n:]
    if at.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    bad = int(torch.randint(80, 170, ()))
    losses = []
    watch = lsa.watch(
        model, optimizer, batches=(x[probe], y[probe]),
        loss=token_loss if at.model == "gpt" else None, measure=("update", "sharpness"),
        every=EVERY, budget=None, track=False,
    )  # fmt: skip
    with watch:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rate(at, step)
            index = rest[torch.randint(len(rest), (32,))]
            inputs, targets = x[index], y[index]
            if at.course == "batch" and bad <= step < bad + 6:
                targets = targets.flip(0).roll(3, -1)
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
    return {"setting": at._asdict(), "losses": losses, "rows": watch.rows}


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy, a mean over samples of equally many tokens."""
    return F.cross_entropy(outputs, targets)


def spike(losses: Sequence[float]) -> int | None:
    """The first step, from 1, at which a training spikes."""
    start = sum(losses[:3]) / 3
    for t in range(MEMORY + 3, len(losses) + 1):
        now, before = losses[t - 3 : t], losses[t - 3 - MEMORY : t - 3]
        usual, mean = statistics.median(before), sum(now) / 3
        if not math.isfinite(mean) or mean > usual + BACK * max(0.1, start - usual):
            return t
    return None


# --- rules ----------------------------------------------------------------------------------------

Rows = Sequence[dict[str, float]]
Rule = Callable[[Rows, float], list[int]]
"""`(rows, level) → steps at which it says that a spike is near`."""


def over_quantile(rows: Rows, level: float) -> list[int]:
    """The plain baseline: the gradient norm over its running 95 % quantile, times a level."""
    found, seen = [], []
    for row in rows:
        norm = row.get("gradient_norm", math.nan)
        if len(seen) >= 20 and not norm <= level * sorted(seen[-50:])[int(0.95 * len(seen[-50:]))]:
            found.append(int(row["step"]))
        seen.append(norm)
    return found


def in_a_row(over: Callable[[dict[str, float], float], bool | None], times: int) -> Rule:
    """Some measurements in a row that are over a level; None is no measurement."""

    def rule(rows: Rows, level: float) -> list[int]:
        found, run = [], 0
        for row in rows:
            said = over(row, level)
            if said is not None:
                run = run + 1 if said else 0
                found += [int(row["step"])] if run >= times else []
        return found

    return rule


def above(name: str, times: int = 2) -> Rule:
    """A number over a level, after the warm-up."""
    return in_a_row(
        lambda row, level: row[name] > level if name in row and row["step"] > 20 else None, times
    )


def over_median(name: str) -> Rule:
    """A number over its running median, times a level."""

    def rule(rows: Rows, level: float) -> list[int]:
        found, seen = [], []
        for row in rows:
            if name not in row:
                continue
            if len(seen) >= 8 and row[name] > level * statistics.median(seen[-20:]):
                found.append(int(row["step"]))
            seen.append(row[name])
        return found

    return rule


def too_long(row: dict[str, float], level: float) -> bool | None:
    """Whether a step went too far on the probe set: uphill, or a critical factor below 1/level."""
    if "gain" not in row or row["step"] <= 20:
        return None
    return row["gain"] < 0 or row.get("critical_factor", math.inf) < 1 / level


def both(first: Rule, second: Rule) -> Rule:
    """Both within ten steps, the second at its level 1."""

    def rule(rows: Rows, level: float) -> list[int]:
        others = second(rows, 1.0)
        return [step for step in first(rows, level) if any(0 <= step - o <= 10 for o in others)]

    return rule


LEVELS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
RULES: dict[str, Rule] = {
    "gradient norm over its running quantile": over_quantile,
    "update norm over its median": over_median("update_norm"),
    "directional sharpness over its median": over_median("directional_sharpness"),
    "sharpness over threshold, twice": above("threshold_ratio", 2),
    "sharpness over threshold, four times": above("threshold_ratio", 4),
    "critical factor, twice": in_a_row(too_long, 2),
    "critical factor, four times": in_a_row(too_long, 4),
    "sharpness and critical factor": both(above("threshold_ratio", 2), in_a_row(too_long, 2)),
}


class Count(NamedTuple):
    """How a rule has done."""

    hits: int  # spikes with an alarm in the steps before
    misses: int
    right: int  # alarms in the steps before a spike
    false: int  # all others
    leads: list[int]  # steps from the first right alarm to its spike

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.false)

    @property
    def recall(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def score(self) -> float:
        """Their harmonic mean."""
        return 2 * self.precision * self.recall / max(1e-9, self.precision + self.recall)


def count(trainings: Sequence[dict[str, Any]], rule: Rule, level: float) -> Count:
    """Alarms of some trainings up to their spike, those of QUIET steps being one."""
    hits = misses = right = false = 0
    leads = []
    for one in trainings:
        at, alarms = spike(one["losses"]), []
        for step in rule(one["rows"], level):
            if not alarms or step - alarms[-1] >= QUIET:
                alarms.append(step)
        alarms = [step for step in alarms if at is None or step < at]
        near = [step for step in alarms if at is not None and at - step <= BEFORE]
        right, false = right + len(near), false + len(alarms) - len(near)
        if at is not None:
            hits, misses = hits + bool(near), misses + (not near)
            leads += [at - near[0]] if near else []
    return Count(hits, misses, right, false, leads)


def judge(folder: Path) -> None:
    """Print what each rule is worth, at the level that was best on the trainings it was made on."""
    made, others = (read(folder / name) for name in ("made", "judged"))
    for name, trainings in (("made on", made), ("judged on", others)):
        spikes = [one["setting"]["course"] for one in trainings if spike(one["losses"]) is not None]
        by = ", ".join(f"{spikes.count(course)} {course}" for course in sorted({*spikes}))
        calm = len(trainings) - len(spikes)
        print(f"{name}: {len(spikes)} trainings that spike ({by}), {calm} calm ones")
    rows = []
    for name, rule in RULES.items():
        level = max(LEVELS, key=lambda level: count(made, rule, level).score)
        found = count(others, rule, level)
        rows.append({
            "rule": name,
            "level": level,
            "hits": found.hits,
            "misses": found.misses,
            "false alarms": found.false,
            "precision": round(found.precision, 2),
            "recall": round(found.recall, 2),
            "median lead, steps": statistics.median(found.leads) if found.leads else "–",
        })  # fmt: skip
    print(table(rows))


def read(folder: Path) -> list[dict[str, Any]]:
    """Recorded trainings."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alarm", description=__doc__)
    parser.add_argument("what", choices=("run", "judge"))
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    if chosen.what == "judge":
        judge(chosen.folder)
        return
    torch.set_num_threads(1)
    for name, made in (("made", True), ("judged", False)):
        (chosen.folder / name).mkdir(parents=True, exist_ok=True)
        for at in settings(made):
            path = chosen.folder / name / ("-".join(map(str, at)) + ".json")
            if not path.exists():
                path.write_text(json.dumps(trained(at)))


if __name__ == "__main__":
    main()

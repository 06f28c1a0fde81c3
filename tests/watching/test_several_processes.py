"""Two processes, a compiled model: the same training, and the numbers of one process."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watching import processes
from watching.trainings import data, fingerprint, network, seed, stream

import lsa
from lsa.watching.own_noise import estimates

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


def outcome(kind: str, watched: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, processes.__file__, kind, watched, str(folder), str(port)]
    subprocess.run(call, check=True, timeout=300)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "inside", "compiled", "fsdp"])
def test_two_processes(kind: str, tmp_path: Path):
    with_watch = outcome(kind, "yes", tmp_path / "a")
    without = outcome(kind, "no", tmp_path / "b")
    for a, b in zip(with_watch, without, strict=True):
        assert {**a, "rows": []} == {**b, "rows": []}
    rows, others = with_watch[0]["rows"], with_watch[1]["rows"]
    assert others == [], "the first process alone keeps and logs"
    if kind != "fsdp":
        assert [row["step"] for row in rows if "directional_sharpness" in row] == [2, 4]
        assert all("gradient_norm_unclipped" in row for row in rows)
    else:
        assert [row["step"] for row in rows if "directional_sharpness" in row] == [2, 4]
        compare_with_one_process(rows)
    # One process, both halves of the batch, float64.
    model = copy.deepcopy(processes.network()).double().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = processes.data()
    for step, row in enumerate(rows):
        index = slice(2 * processes.BATCH * step, 2 * processes.BATCH * (step + 1))
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        optimizer.zero_grad()
        first_half = x[index][: processes.BATCH].double(), y[index][: processes.BATCH]
        own = torch.autograd.grad(
            F.cross_entropy(model(first_half[0]), first_half[1]), list(model.parameters())
        )
        F.cross_entropy(model(x[index].double()), y[index]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), processes.CLIP)
        first = [p.grad.norm() ** 2 for p in model[0].parameters()]
        optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert row["gradient_norm"] == pytest.approx(min(norm.item(), processes.CLIP), rel=1e-4)
        assert row["update_norm"] == pytest.approx((after - before).norm().item(), rel=1e-3)
        assert row["weight_norm"] == pytest.approx(after.norm().item(), rel=1e-5)
        if "gradient_norm_unclipped" in row:
            assert row["gradient_norm_unclipped"] == pytest.approx(norm.item(), rel=1e-4)
        if kind != "fsdp":
            each = sum(float(g.square().sum()) for g in own)
            signal, trace = estimates(each, float(norm) ** 2, 2, processes.BATCH)
            assert row["noise_trace"] == pytest.approx(trace, rel=1e-3)
            assert row["gradient_squared"] == pytest.approx(signal, rel=1e-3, abs=1e-5)
        if "gradient_norm/0" in row:
            assert row["gradient_norm/0"] == pytest.approx(sum(first).item() ** 0.5, rel=1e-4)


def compare_with_one_process(rows: list[dict[str, float]]) -> None:
    """What was measured on shards, by the same watch of one process on whole batches."""
    model = processes.network().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = processes.data()
    options = {"budget": None, "track": False, "strict": True, "every": 2}
    kinds = ("update", "noise", "sharpness", "lambda_max")
    options |= {"batches": processes.batches(), "objective": lsa.objectives.supervised()}
    with lsa.watch(model, optimizer, measure=kinds, **options) as watch:
        for step in range(processes.STEPS):
            index = slice(2 * processes.BATCH * step, 2 * processes.BATCH * (step + 1))
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), processes.CLIP)
            optimizer.step()
    names = ("probe_loss", "directional_sharpness", "gain", "gain_first_order", "lambda_max")
    names += ("gain_second_order", "noise_trace", "gradient_squared", "noise_trace_se_data")
    names += ("threshold",)
    compared = 0
    for one, two in zip(watch.rows, rows, strict=True):
        for name in names:
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
                compared += 1
        if "sharpness" in one:  # both searches end where they may
            apart = one["sharpness_residual"] + two["sharpness_residual"]
            assert abs(two["sharpness"] - one["sharpness"]) <= apart
            assert two["sharpness"] == pytest.approx(one["sharpness"], rel=2e-2)
            ratio = two["sharpness"] / two["threshold"]
            assert two["threshold_ratio"] == pytest.approx(ratio)
        if "critical_factor" in one:
            assert two["critical_factor"] == pytest.approx(one["critical_factor"], rel=5e-3)
    assert compared == 2 * len(names)


def compiled(watched: bool) -> tuple[dict[str, Any], int]:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    base, loader = network(nn.BatchNorm2d(4)), data()
    model = torch.compile(base, backend="aot_eager")
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    seed()
    seen, batches = [], stream(loader)
    kinds = ("update", "noise", "sharpness", "lambda_max")
    options = {"every": 2, "budget": None, "track": False, "strict": True, "measure": kinds}
    watch: Any = contextlib.nullcontext()
    if watched:
        watch = lsa.watch(model, optimizer, batches=loader, **options)
    with watch:
        for _ in range(6):
            x, y = next(batches)
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            optimizer.step()
            seen += [x.sum(), value]
    return fingerprint(seen, base, optimizer), counters["stats"]["unique_graphs"]


def test_a_compiled_model():
    with_watch, graphs = compiled(True)
    without, as_many = compiled(False)
    assert with_watch == without
    assert graphs == as_many, "it was compiled again"

"""`torchrun`-like: two gloo processes that train under DDP or FSDP, watched or not.

python processes.py KIND WATCHED FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import lsa

STEPS, BATCH, CLIP = 4, 12, 0.3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 3))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(STEPS * BATCH * 2, 6, generator=rng), torch.arange(STEPS * BATCH * 2) % 3


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The probe set, the same in all processes."""
    x, y = data()
    return [*zip(x[:24].split(8), y[:24].split(8), strict=True)]


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind != "fsdp":
        model = nn.parallel.DistributedDataParallel(model)
        return torch.compile(model, backend="aot_eager") if kind == "compiled" else model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def work(rank: int, kind: str, watched: bool, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    base = network().eval()  # without dropout the oracle is one process
    model = wrapped(kind, base)
    x, y = data()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    options: dict[str, Any] = {"budget": None, "track": False, "strict": True, "every": 2}
    options |= {"batches": batches(), "measure": ("update", "noise", "sharpness", "lambda_max")}
    torch.manual_seed(5 + rank)
    random.seed(rank)
    np.random.seed(rank)
    shown = base if kind == "inside" else model  # as trainers show it to their callbacks
    watch = lsa.watch(shown, optimizer, **options) if watched else contextlib.nullcontext()
    with watch:
        for step in range(STEPS):
            index = torch.arange(BATCH) + 2 * BATCH * step + BATCH * rank
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in base.parameters()]
    grads = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in base.parameters()
    ]
    out = {
        "weights": [p.detach().numpy().tobytes().hex() for p in full],
        "gradients": [p.detach().numpy().tobytes().hex() for p in grads],
        "states": [torch.rand(2).tolist(), random.random(), float(np.random.rand())],
        "rows": watch.rows if watched else [],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(out))
    dist.barrier()  # one that leaves first may end the other's threads
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, watched, folder, port = sys.argv[1:]
    mp.spawn(work, (kind, watched == "yes", folder, int(port)), nprocs=2)  # pyright: ignore

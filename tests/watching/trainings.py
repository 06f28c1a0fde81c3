"""Small trainings of many kinds that say all that a watch must leave alone."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STEPS = 7
DEVICE = "cpu"  # that everything trains on; tests on a GPU change it
Attach = Callable[..., Any]  # (model, optimizers, **options) → a context


def data(n: int = 96) -> torch.utils.data.DataLoader:
    """Shuffled batches whose order and augmentation hang on every generator there is."""
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 1, 8, 8, generator=rng), torch.randint(0, 3, (n,), generator=rng)

    class Set(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return n

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return x[i] + 0.01 * random.random() + 0.01 * float(np.random.rand()), y[i]

    order = torch.Generator().manual_seed(2)
    return torch.utils.data.DataLoader(Set(), batch_size=16, shuffle=True, generator=order)


def network(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *extra, nn.Tanh(), nn.Flatten(), nn.Linear(144, 12), nn.Tanh(),
        nn.Linear(12, 3),
    ).to(DEVICE)  # fmt: skip


def stream(loader: Any):
    while True:
        for x, y in loader:
            yield x.to(DEVICE), y.to(DEVICE)


def fingerprint(seen: list[Any], model: nn.Module, *others: Any) -> dict[str, Any]:
    """Everything that may not differ, as bytes."""

    def raw(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().cpu().contiguous().view(-1).numpy().tobytes()
        if isinstance(value, dict):
            return {key: raw(v) for key, v in value.items()}
        return [raw(v) for v in value] if isinstance(value, list | tuple) else value

    return {
        "seen": raw(seen),
        "weights": raw(dict(model.state_dict())),
        "gradients": raw([p.grad for p in model.parameters()]),
        "modes": [m.training for m in model.modules()],
        "others": raw([copy.deepcopy(o.state_dict()) for o in others]),
        "torch": raw(torch.get_rng_state()),
        "cuda": raw(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [np.random.get_state()[1].tobytes(), np.random.get_state()[2]],
        "python": random.getstate(),
        "drawn": [*torch.rand(2).tolist(), random.random(), float(np.random.rand())],
    }


def seed() -> None:
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)


def plain(
    attach: Attach,
    *layers: nn.Module,
    make: Callable[..., Any] = lambda p: torch.optim.AdamW(p, lr=1e-2),
    accumulate: int = 1,
    clip: float | None = None,
    schedule: bool = False,
    scaled: bool = False,
    average: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
    loss: Any = F.cross_entropy,
) -> dict[str, Any]:
    """A loop as people write it."""
    base = network(*layers)
    model, loader = wrap(base), data()
    optimizer = make(base.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**14, enabled=scaled)
    ema = torch.optim.swa_utils.AveragedModel(base) if average else None
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader, scaler=scaler if scaled else None):
        for _ in range(STEPS):
            optimizer.zero_grad()
            for _ in range(accumulate):
                x, y = next(batches)
                half = (
                    torch.autocast(DEVICE, torch.bfloat16) if scaled else contextlib.nullcontext()
                )
                with half:
                    value = loss(model(x), y) / accumulate
                scaler.scale(value).backward()
                seen.append(x.sum())
                seen.append(value)
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(base.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            if schedule:
                scheduler.step()
            if ema is not None:
                ema.update_parameters(base)
    others = [optimizer, *([] if ema is None else [ema])]
    return fingerprint(seen, base, *others)


def several(attach: Attach) -> dict[str, Any]:
    """Two optimizers that step one after the other."""
    model, loader = network(), data()
    parts = [list(model[0].parameters()), list(model[1:].parameters())]
    optimizers = [
        torch.optim.SGD(parts[0], lr=0.05, momentum=0.9),
        torch.optim.Adam(parts[1], lr=1e-2),
    ]
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizers, loader=loader):
        for _ in range(STEPS):
            x, y = next(batches)
            for optimizer in optimizers:
                optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            seen += [x.sum(), value]
            for optimizer in optimizers:
                optimizer.step()
    return fingerprint(seen, model, *optimizers)


def closures(attach: Attach) -> dict[str, Any]:
    """LBFGS, which evaluates the loss as often as it likes."""
    model, loader = network(nn.BatchNorm2d(4), nn.Dropout(0.2)), data()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=4)
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader):
        for _ in range(STEPS):
            x, y = next(batches)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                value = F.cross_entropy(model(x), y)
                value.backward()
                seen.append(value)
                return value

            seen.append(optimizer.step(closure))
    return fingerprint(seen, model, optimizer)


CASES: dict[str, Callable[[Attach], dict[str, Any]]] = {
    "plain": plain,
    "sgd": lambda a: plain(a, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "batch norm": lambda a: plain(a, nn.BatchNorm2d(4)),
    "dropout": lambda a: plain(a, nn.Dropout(0.3)),
    "accumulation": lambda a: plain(a, nn.BatchNorm2d(4), accumulate=3),
    "clipping": lambda a: plain(a, clip=0.1),
    "amp": lambda a: plain(a, nn.BatchNorm2d(4), scaled=True),
    "amp, clipping": lambda a: plain(a, scaled=True, clip=0.1),
    "fused amp": lambda a: plain(
        a, scaled=True, make=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)
    ),
    "ema": lambda a: plain(a, nn.BatchNorm2d(4), average=True),
    "schedule": lambda a: plain(a, schedule=True),
    "loss module": lambda a: plain(a, loss=nn.CrossEntropyLoss()),
    "several": several,
    "closures": closures,
}

"""Small trainings of many kinds that say all that a watch must leave alone."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny import Merging
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
    half: torch.dtype = torch.bfloat16,
    average: bool = False,
    compiles: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
    loss: Any = F.cross_entropy,
    zeros: bool = False,
    between: Callable[[int, nn.Module, torch.optim.Optimizer], Any] = lambda *_: None,
) -> dict[str, Any]:
    """A loop as people write it."""
    base = network(*layers)
    model, loader = wrap(base), data()
    optimizer = make(base.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**14, enabled=scaled)
    ema = torch.optim.swa_utils.AveragedModel(base) if average else None
    if compiles:
        torch._dynamo.reset()
    make_step = torch.compile(optimizer.step, backend="aot_eager") if compiles else None
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader, scaler=scaler if scaled else None):
        for step in range(STEPS):
            seen.append(between(step, base, optimizer))
            optimizer.zero_grad(set_to_none=not zeros)
            for _ in range(accumulate):
                x, y = next(batches)
                with torch.autocast(DEVICE, half, enabled=scaled):
                    value = loss(model(x), y) / accumulate
                scaler.scale(value).backward()
                seen.append(x.sum())
                seen.append(value)
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(base.parameters(), clip)
            if make_step is not None:
                make_step()
            else:
                scaler.step(optimizer)
                scaler.update()
            if schedule:
                scheduler.step()
            if ema is not None:
                ema.update_parameters(base)
    others = [optimizer, *([] if ema is None else [ema])]
    return fingerprint(seen, base, *others)


def in_turn(attach: Attach, model: nn.Module, optimizers: list[Any], loader: Any) -> dict[str, Any]:
    """A training in which every optimizer steps in each step."""
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


def several(attach: Attach) -> dict[str, Any]:
    """Two optimizers that step one after the other."""
    model, loader = network(), data()
    parts = [list(model[0].parameters()), list(model[1:].parameters())]
    optimizers = [
        torch.optim.SGD(parts[0], lr=0.05, momentum=0.9),
        torch.optim.Adam(parts[1], lr=1e-2),
    ]
    return in_turn(attach, model, optimizers, loader)


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


def in_backward(attach: Attach) -> dict[str, Any]:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""
    model, loader = network(), data()
    optimizers = {
        p: torch.optim.SGD([p], lr=0.05, momentum=0.9) for p in [*model.parameters()][::-1]
    }

    def used(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(used)  # pyright: ignore[reportArgumentType]
    seed()
    seen, batches = [], stream(loader)
    with attach(model, [*optimizers.values()], loader=loader):
        for _ in range(STEPS):
            x, y = next(batches)
            value = F.cross_entropy(model(x), y)
            value.backward()
            seen += [x.sum(), value]
    return fingerprint(seen, model, *optimizers.values())


def twice(attach: Attach) -> dict[str, Any]:
    """A network that is used twice in a step."""
    model, loader = network(nn.Dropout(0.2)), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader):
        for _ in range(STEPS):
            x, y = next(batches)
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y) + 0.1 * model(-x).square().mean()
            value.backward()
            seen += [x.sum(), value]
            optimizer.step()
    return fingerprint(seen, model, optimizer)


def skipped(attach: Attach) -> dict[str, Any]:
    """Steps that are left out: by a GradScaler, which finds an infinity, and by the loop."""
    model, loader = network(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader, scaler=scaler):
        for step in range(STEPS):
            x, y = next(batches)
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y) * (math.inf if step == 2 else 1.0)
            scaler.scale(value).backward()
            seen += [x.sum(), value]
            if step != 4:
                scaler.step(optimizer)
                scaler.update()
    return fingerprint(seen, model, optimizer, scaler)


def with_hooks(attach: Attach) -> dict[str, Any]:
    """The training's own hooks on gradients, which draw random numbers."""
    model, loader = network(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed()
    seen, batches = [], stream(loader)
    for p in model.parameters():
        p.register_hook(lambda g: g + 1e-3 * torch.randn_like(g))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))  # pyright: ignore
    with attach(model, optimizer, loader=loader):
        for _ in range(STEPS):
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return fingerprint(seen, model, optimizer)


def two_models(attach: Attach) -> dict[str, Any]:
    """A network that learns from another, which is trained and watched as well."""
    models, loader = [network(), network(nn.BatchNorm2d(4), nn.Dropout(0.2))], data()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    seed()
    seen, batches = [], stream(loader)
    with contextlib.ExitStack() as stack:
        for model, optimizer in zip(models, optimizers, strict=True):
            stack.enter_context(attach(model, optimizer, loader=loader))
        for _ in range(STEPS):
            x, y = next(batches)
            for optimizer in optimizers:
                optimizer.zero_grad()
            outputs = models[0](x)
            value = F.cross_entropy(outputs, y) + F.mse_loss(models[1](x), outputs.detach())
            value.backward()
            seen += [x.sum(), value]
            for optimizer in optimizers:
                optimizer.step()
    return fingerprint(seen, models[0], models[1], *optimizers)


def computed_weights(attach: Attach) -> dict[str, Any]:
    """Weights that each look at them computes anew, and moves a state with it."""
    model, loader = network(), data()
    nn.utils.parametrizations.spectral_norm(model[3])  # pyright: ignore
    nn.utils.parametrizations.weight_norm(model[5])  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader):
        for _ in range(STEPS):
            x, y = next(batches)
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            seen += [x.sum(), value]
            optimizer.step()
    return fingerprint(seen, model, optimizer)


def adapters(attach: Attach) -> dict[str, Any]:
    """Layers that do more in `eval()` and `train()` than to set a flag."""
    torch.manual_seed(0)
    layers = [Merging(64, 12), Merging(12, 3)]
    model, loader = nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), layers[1]).to(DEVICE), data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = in_turn(attach, model, [optimizer], loader)
    return found | {"merged": [layer.merged for layer in layers]}


def lookups(attach: Attach, **options: Any) -> dict[str, Any]:
    """An embedding whose gradient is sparse, or weighed by how often a row is read."""
    torch.manual_seed(0)
    table = nn.Embedding(20, 6, **options)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(24, 3)).to(DEVICE)
    ids, y = torch.randint(20, (96, 4)), torch.randint(3, (96,))
    pairs = torch.utils.data.TensorDataset(ids, y)
    loader = torch.utils.data.DataLoader(pairs, batch_size=16)
    optimizers = [
        (torch.optim.SparseAdam if table.sparse else torch.optim.Adam)(table.parameters(), lr=1e-2),
        torch.optim.Adam(model[2].parameters(), lr=1e-2),
    ]
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizers, loader=loader):
        for _ in range(STEPS):
            x, targets = next(batches)
            for optimizer in optimizers:
                optimizer.zero_grad()
            value = F.cross_entropy(model(x), targets)
            value.backward()
            seen += [value, *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)]
            for optimizer in optimizers:
                optimizer.step()
    seen += [table.sparse, table.scale_grad_by_freq]
    for p in model.parameters():
        p.grad = None
    return fingerprint(seen, model, *optimizers)


def grown(attach: Attach) -> dict[str, Any]:
    """A table that gets new rows by `.data = …`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 3)).to(DEVICE)
    ids, y = torch.randint(20, (96, 4)), torch.randint(3, (96,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, y), batch_size=16)
    table, optimizer = model[0].weight, torch.optim.SGD(model.parameters(), lr=1e-2)
    seed()
    seen, batches = [], stream(loader)
    with attach(model, optimizer, loader=loader):
        for step in range(STEPS):
            if step in (3, 4):
                table.data = torch.cat([table.data, table.data[:2] + step])
            for _ in range(2):
                x, targets = next(batches)
                value = F.cross_entropy(model((x + step) % len(table)), targets) / 2
                value.backward()
                seen.append(value.item())
                del value  # whose graph would keep the old shape
            optimizer.step()
            optimizer.zero_grad()
    return fingerprint(seen, model, optimizer)


def muon(attach: Attach) -> dict[str, Any]:
    """Muon for matrices, AdamW for all else."""
    model, loader = network(), data()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
    return in_turn(attach, model, optimizers, loader)


def evaluated(_step: int, model: nn.Module, _: Any) -> torch.Tensor:
    """An evaluation between two steps."""
    model.eval()
    with torch.no_grad():
        found = model(torch.ones(3, 1, 8, 8, device=DEVICE)).clone()
    model.train()
    return found


def thawed(step: int, model: nn.Module, _: Any) -> None:
    """A layer that is frozen at first."""
    model[0].requires_grad_(step >= 3)  # pyright: ignore


def added(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A group of parameters that comes later."""
    if step == 3:
        optimizer.add_param_group({"params": [*model[0].parameters()]})  # pyright: ignore


def copied(_step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Copies by every way of network and optimizer, used."""
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    twins.append(torch.load(file, weights_only=False)[0])
    optimizers = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for twin in optimizers:
        twin.step()
    for twin in twins:
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
    return torch.stack([twin(torch.ones(3, 1, 8, 8, device=DEVICE)).sum() for twin in twins])


def resumed(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """States that are saved and loaded again."""
    if step == 3:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def no_number(step: int, model: nn.Module, _: Any) -> None:
    """Weights that are no numbers from a step on."""
    if step == 4:
        with torch.no_grad():
            model[0].bias.fill_(float("nan"))  # pyright: ignore


def optimizer(name: str, **options: Any) -> Callable[[Attach], dict[str, Any]]:
    """A plain training with one of torch's optimizers."""
    options = {"lr": 1e-2} | options
    return lambda a: plain(a, make=lambda p: getattr(torch.optim, name)(p, **options))


OPTIMIZERS = {
    "adam, foreach": optimizer("Adam", foreach=True),
    "adam, one by one": optimizer("Adam", foreach=False),
    "adamw, fused": optimizer("AdamW", fused=True),
    "amsgrad, maximising": optimizer("Adam", amsgrad=True, maximize=True),
    "nesterov, weight decay": optimizer("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": optimizer("RMSprop", centered=True, momentum=0.5),
    "adagrad": optimizer("Adagrad"),
    "adadelta": optimizer("Adadelta", lr=1.0),
    "nadam": optimizer("NAdam", decoupled_weight_decay=True),
    "radam": optimizer("RAdam"),
    "adamax": optimizer("Adamax"),
    "asgd": optimizer("ASGD"),
    "rprop": optimizer("Rprop"),
    "no rate": optimizer("AdamW", lr=0.0),
    "sgd, fused, maximising": optimizer("SGD", fused=True, maximize=True),
    "rate in a tensor": lambda a: plain(
        a, make=lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2))
    ),
}

CASES: dict[str, Callable[[Attach], dict[str, Any]]] = {
    "plain": plain,
    "sgd": lambda a: plain(a, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "batch norm": lambda a: plain(a, nn.BatchNorm2d(4)),
    "dropout": lambda a: plain(a, nn.Dropout(0.3)),
    "accumulation": lambda a: plain(a, nn.BatchNorm2d(4), accumulate=3),
    "clipping": lambda a: plain(a, clip=0.1),
    "amp": lambda a: plain(a, nn.BatchNorm2d(4), scaled=True),
    "amp, float16": lambda a: plain(a, nn.BatchNorm2d(4), scaled=True, half=torch.float16),
    "amp, clipping": lambda a: plain(a, scaled=True, clip=0.1),
    "fused amp": lambda a: plain(
        a, scaled=True, make=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)
    ),
    "ema": lambda a: plain(a, nn.BatchNorm2d(4), average=True),
    "schedule": lambda a: plain(a, schedule=True),
    "loss module": lambda a: plain(a, loss=nn.CrossEntropyLoss()),
    "several": several,
    "closures": closures,
    "zeros for none": lambda a: plain(a, zeros=True),
    "zeros, accumulation": lambda a: plain(a, zeros=True, accumulate=2),
    "in backward": in_backward,
    "twice a step": twice,
    "evaluated": lambda a: plain(a, nn.BatchNorm2d(4), nn.Dropout(0.2), between=evaluated),
    "thawed": lambda a: plain(a, between=thawed),
    "added": lambda a: plain(
        a,
        make=lambda p: torch.optim.AdamW([*p][2:], lr=1e-2),
        between=added,
    ),
    "copied": lambda a: plain(a, nn.BatchNorm2d(4), between=copied),
    "resumed": lambda a: plain(a, between=resumed),
    "no number": lambda a: plain(a, between=no_number),
    "skipped steps": skipped,
    "own hooks": with_hooks,
    "two models": two_models,
    "computed weights": computed_weights,
    "adapters": adapters,
    "sparse": lambda a: lookups(a, sparse=True),
    "by frequency": lambda a: lookups(a, scale_grad_by_freq=True),
    "grown": grown,
    "muon": muon,
    "compiled step": lambda a: plain(a, nn.BatchNorm2d(4), compiles=True),
    "compiled step, sgd": lambda a: plain(
        a, compiles=True, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    ),
    **OPTIMIZERS,
}

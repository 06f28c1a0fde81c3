"""What a training may do to its own parts while it is watched, and the numbers that follow."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa
from lsa.watching import budget
from lsa.watching.probing import KINDS


def setting() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.randn(24, 6), torch.arange(24) % 3


def watched(model: nn.Module, optimizer, **options) -> lsa.watching.Watch:
    given = {"budget": None, "track": False, "every": 1, "strict": True}
    return lsa.watch(model, optimizer, **(given | options))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step; the length of all gradients."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    found = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return math.sqrt(sum(map(float, found)))


@pytest.mark.parametrize("way", ["thawed", "added", "frozen"])
def test_other_parameters_than_at_first_are_followed(way: str):
    model, x, y = setting()
    if way == "thawed":
        model[0].requires_grad_(False)
    parameters = model[2].parameters() if way == "added" else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    kinds = [k for k in KINDS if k != "batch_sharpness"] + ["noise_of_samples"]
    with watched(model, optimizer, batches=(x, y), measure=kinds) as watch:
        norms = [step(model, optimizer, x, y)]
        if way == "added":
            norms[0] = math.nan  # of parameters that nothing moves too
            optimizer.add_param_group({"params": [*model[0].parameters()]})
        else:
            model[0].requires_grad_(way == "thawed")
        norms += [step(model, optimizer, x, y) for _ in range(2)]
    found = [row["gradient_norm"] for row in watch.rows]
    assert found[1:] == pytest.approx(norms[1:], rel=1e-5)
    last = watch.rows[-1]
    assert ("gradient_norm/0" in last) == (way != "frozen")
    # The step and what it gains are of all parameters that move.
    assert last["update_norm"] == pytest.approx(0.1 * norms[-1], rel=1e-4)
    assert last["gain_first_order"] == pytest.approx(0.1 * norms[-1] ** 2, rel=1e-2)
    assert "lambda_max" in last and "noise_trace" in last


def test_a_parameter_that_grows_is_measured_as_it_then_is():
    """By `.data = …`, as tables of tokens do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, y = torch.randint(10, (24, 3)), torch.arange(24) % 3
    with watched(model, optimizer, batches=(ids, y), measure=[*KINDS, "noise_of_samples"]) as watch:
        step(model, optimizer, ids, y)
        model[0].weight.data = torch.cat([model[0].weight.data, torch.ones(2, 4)])
        norms = [step(model, optimizer, ids + 2, y) for _ in range(2)]
    assert [row["gradient_norm"] for row in watch.rows[1:]] == pytest.approx(norms, rel=1e-5)
    assert watch.rows[-1]["update_norm"] == pytest.approx(0.1 * norms[-1], rel=1e-4)
    assert "lambda_max" in watch.rows[-1] and "noise_trace" in watch.rows[-1]


def test_gradients_that_are_used_as_they_are_made():
    model, x, y = setting()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in [*model.parameters()][::-1]}

    def used(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none=False)

    for p in optimizers:
        p.register_post_accumulate_grad_hook(used)  # pyright: ignore[reportArgumentType]
    with watched(model, [*optimizers.values()]) as watch:
        for _ in range(3):
            exact = torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])
            F.cross_entropy(model(x), y).backward()
            length = math.sqrt(sum(float(g.square().sum()) for g in exact))
            assert watch.rows[-1]["gradient_norm"] == pytest.approx(length, rel=1e-5)
            assert watch.rows[-1].get("gradient_norm_unclipped", length) >= 0.999 * length


class Model(nn.Module):
    """Whose outputs have a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = setting()[0]

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.network(x), y)}


def test_a_watch_does_not_take_the_passes_of_another_for_the_trainings():
    model, (_, x, y) = Model(), setting()
    optimizers = [torch.optim.SGD(model.network[i].parameters(), lr=0.1) for i in (0, 2)]

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> lsa.Terms:
        return lsa.Terms(model(*batch)["loss"] * len(batch[0]), len(batch[0]))

    some = [(x[:7], y[:7]), (x[7:14], y[7:14]), (x[14:21], y[14:21])]
    watches = [
        watched(model, optimizers[0], batches=some, objective=objective),
        watched(model, optimizers[1], measure=["noise_of_samples"]),
    ]
    for _ in range(3):
        model.zero_grad()
        loss = model(x, y)["loss"]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for watch in watches:
        watch.close()
        assert watch.rows[-1]["loss"] == pytest.approx(loss.item())
    assert watches[1].rows[-1]["noise_trace"] > 0


@pytest.mark.parametrize("way", ["one pass forward, two back", "unequal passes", "two passes"])
def test_only_equal_draws_tell_the_noise(way: str):
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as watch:
        if way.startswith("one"):
            outputs = model(x)
            F.cross_entropy(outputs, y).backward(retain_graph=True)
            (0.1 * outputs.square().mean()).backward()
        else:
            cut = 16 if way == "unequal passes" else 12
            for part in (slice(0, cut), slice(cut, 24)):
                loss = F.cross_entropy(model(x[part]), y[part], reduction="sum") / 24
                loss.backward()
        optimizer.step()
    assert ("noise_trace" in watch.rows[0]) == (way == "two passes")


def test_weights_that_are_no_numbers_are_not_measured_on():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, batches=(x, y), measure=KINDS) as watch:
        step(model, optimizer, x, y)
        step(model, optimizer, x * math.nan, y)
        step(model, optimizer, x, y)
    first, *others = watch.rows
    assert "lambda_max" in first and math.isfinite(first["gradient_norm"])
    assert all(math.isnan(row["gradient_norm"]) for row in others)
    assert not any("lambda_max" in row or "probe_loss" in row for row in others)


def test_steps_without_work_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch):
    """From the step before a measurement to the measurement it works, and asks the clock."""
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked: list[int] = []  # the steps that were made before
    steps: list[Tensor] = []
    now = SimpleNamespace(perf_counter=lambda: asked.append(len(steps)) or 1e-3 * len(asked))
    monkeypatch.setattr(budget, "time", now)
    with watched(model, optimizer, batches=(x, y), every=10, norms=7) as watch:
        while len(steps) < 30:
            optimizer.zero_grad()
            steps.append(F.cross_entropy(model(x), y))
            steps[-1].backward()
            optimizer.step()
    at = {"gradient_norm": {1, 8, 10, 17, 20, 27, 30}, "probe_loss": {10, 20, 30}}
    for name, due in at.items():
        assert {int(s) for s in watch._history.column(name)[0]} == due
    assert {*asked} == {s - before for s in at["gradient_norm"] for before in (0, 1)}


def test_nothing_is_left_of_a_watch_that_is_closed():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss()
    kinds = ["update", "noise_of_samples"]
    options = {"batches": (x, y), "loss": loss, "measure": kinds}
    with pytest.raises(KeyError), watched(model, optimizer, **options) as watch:
        step(model, optimizer, x, y)
        model[0].requires_grad_(False)
        step(model, optimizer, x, y)
        raise KeyError("of the training")
    step(model, optimizer, x, y)
    assert watch.step == 2
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    for module in (*model.modules(), loss):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # pyright: ignore


@pytest.mark.parametrize("zeros", [False, True])
def test_passes_that_no_step_uses_are_not_counted(zeros: bool):
    """As a GradScaler leaves a step out: noise and loss are those of the passes of the step."""
    rows = []
    for left_out in (False, True):
        model, x, y = setting()
        loss = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watched(model, optimizer, loss=loss) as watch:
            for try_ in range(2 if left_out else 1):
                optimizer.zero_grad(set_to_none=not zeros)
                scale = 1e3 if left_out and try_ == 0 else 1.0
                for part in (slice(0, 12), slice(12, 24)):
                    (loss(model(scale * x[part]), y[part]) / 2).backward()
            optimizer.step()
        rows.append({k: v for k, v in watch.rows[0].items() if k != "overhead"})
    assert rows[0]["noise_trace"] > 0 and rows[0] == rows[1]


@pytest.mark.parametrize("way", ["plain", "one memory", "clipped in between"])
def test_gradients_in_one_memory_are_added_up_all_the_same(way: str):
    """As DistributedDataParallel's may be: a pass writes into all where it writes into one."""
    model, x, y = setting()
    parameters = [*model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    memory = torch.zeros(sum(p.numel() for p in parameters))
    passes = []
    with watched(model, optimizer) as watch:
        optimizer.zero_grad()
        if way == "one memory":
            parts = memory.split([p.numel() for p in parameters])
            for p, part in zip(parameters, parts, strict=True):
                p.grad = part.view_as(p)
        for part in (slice(0, 12), slice(12, 24)):
            loss = F.cross_entropy(model(x[part]), y[part])
            of_pass = torch.autograd.grad(loss, parameters, retain_graph=True)
            passes.append(torch.cat([g.flatten() for g in of_pass]))
            (loss / 2).backward()
            if way == "clipped in between":
                nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.step()
    if way == "clipped in between":  # what is added up is no mean of draws
        assert "noise_trace" not in watch.rows[0]
    else:
        a = torch.stack(passes).double()
        exact = 12 * (a - a.mean(0)).square().sum()
        assert watch.rows[0]["noise_trace"] == pytest.approx(float(exact), rel=1e-4)


def test_a_compiled_step_has_the_numbers_of_a_plain_one():
    rows = []
    for compiles in (False, True):
        model, x, y = setting()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch._dynamo.reset()
        make = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        with watched(model, optimizer, batches=(x, y), measure=KINDS) as watch:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                make()
        # A search that rounds otherwise leaves another residual.
        out = ("overhead", "lambda_max_residual", "sharpness_residual")
        rows.append([{k: v for k, v in row.items() if k not in out} for row in watch.rows])
    for plain, compiled in zip(*rows, strict=True):
        assert "lambda_max" in plain and compiled == pytest.approx(plain, rel=1e-3, abs=1e-6)


def test_measurements_compile_nothing():
    """Torch compiles a function for a few kinds of inputs, and may then raise for another."""
    found = []
    for measured in (False, True):
        torch._dynamo.reset()
        model, x, y = setting()
        compiled: list[int] = []

        def backend(graph, inputs, compiled=compiled):
            compiled.append(len(inputs[-1]))
            return graph.forward

        model.compile(fullgraph=True, dynamic=False, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watched(
            model, optimizer, batches=(x, y) if measured else None, measure=KINDS * measured
        ) as watch:
            norms = [step(model, optimizer, x[:n], y[:n]) for n in (8, 12, 16, 20, 24, 23, 22)]
        assert ("lambda_max" in watch.rows[-1]) == measured
        found.append((norms, len(compiled)))
    torch._dynamo.reset()
    assert found[0] == found[1] and found[0][1] == 7


@pytest.mark.parametrize("where", ["measurement", "step"])
def test_a_training_that_is_interrupted_and_goes_on_is_measured(
    where: str, monkeypatch: pytest.MonkeyPatch
):
    """As by the stop button of a notebook, whose cell is then run again."""
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with watched(model, optimizer, batches=(x, y)) as watch:
        step(model, optimizer, x, y)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            if where == "measurement":
                patched.setattr(watch._norms, "after", interrupted)
                step(model, optimizer, x, y)
            optimizer.step(interrupted)
        norms = [step(model, optimizer, x, y) for _ in range(2)]
    rows = watch.rows[-2:]
    assert [row["gradient_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
    for row, norm in zip(rows, norms, strict=True):
        assert row["update_norm"] == pytest.approx(0.1 * norm, rel=1e-4)
        assert "directional_sharpness" in row


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_curvature_of_embeddings_is_that_of_the_loss(options: dict):
    tops = []
    for chosen in ({}, options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, **chosen), nn.Flatten(), nn.Linear(12, 3))
        x, y = torch.randint(9, (24, 3)), torch.arange(24) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with watched(model, optimizer, batches=(x, y), measure=["lambda_max"]) as watch:
            for _ in range(3):  # a search goes on
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        tops.append(watch.rows[-1]["lambda_max"])
    assert tops[0] == pytest.approx(tops[1], rel=1e-3)


def test_weights_that_a_forward_pass_changes_are_not_measured_on(
    caplog: pytest.LogCaptureFixture,
):
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(9, (24, 3)), torch.arange(24) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, batches=(x, y), strict=False) as watch:
        step(model, optimizer, x, y)
    assert "gradient_norm" in watch.rows[0] and "probe_loss" not in watch.rows[0]
    assert "probes is off from step 1 on: embedding '0' has max_norm=1" in caplog.text


def test_optimizers_in_another_order_than_they_step_in_are_said(caplog: pytest.LogCaptureFixture):
    model, x, y = setting()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with watched(model, [second, first], strict=False) as watch:
        F.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
    assert not watch.rows
    (line,) = caplog.messages
    assert "give lsa.watch the optimizers in the order in which they step" in line


def test_passes_that_are_transformed_are_none_of_the_trainings():
    """A loop that looks at gradients of single samples by torch.func."""
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(parameters: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (one[None],)), target)

    single = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    with watched(model, optimizer, measure=["noise_of_samples"]) as watch:
        for _ in range(2):
            each = single(dict(model.named_parameters()), x, y[:, None])
            step(model, optimizer, x, y)
            flat = torch.cat([g.detach().flatten(1) for g in each.values()], dim=1).double()
            trace = float(flat.var(0).sum())
            assert watch.rows[-1]["noise_trace"] == pytest.approx(trace, rel=1e-4)


def test_in_steps_that_are_not_measured_parameters_have_no_hooks():
    """Torch calls into a table of hooks at every backward pass, be it empty."""
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = next(model.parameters())
    seen: list[Tensor] = []
    handle = own.register_hook(seen.append)
    with watched(model, optimizer, norms=3):
        for _ in range(2):
            step(model, optimizer, x, y)
        for p in model.parameters():
            assert p._post_accumulate_grad_hooks is None
            assert (p._backward_hooks is None) == (p is not own)
    assert len(seen) == 2
    handle.remove()

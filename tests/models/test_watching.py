"""`lsa.watch` in other libraries' training loops: same weights, right numbers, in their run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lsa

pytestmark = [
    pytest.mark.models,
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),
]


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def logged(run_id: str, name: str) -> list[int]:
    return sorted(m.step for m in mlflow.MlflowClient().get_metric_history(run_id, name))


def language_model(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options))


def texts() -> torch.Tensor:
    return torch.randint(50, (64, 12), generator=torch.Generator().manual_seed(1))


def finetuned(folder: Path, *callbacks: Any, dropout: float = 0.1, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, rows = language_model(**dict.fromkeys(DROPOUTS, dropout)), texts()
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, report_to=[],
        logging_steps=2, learning_rate=1e-2, save_strategy="no", use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks])
    trainer.train()
    return model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face(workplace: Path, accumulate: int):
    ids = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    callback = lsa.watching.HuggingFaceCallback(
        batches=batches, every=3, budget=None, log_every=1, strict=True
    )
    options = {"gradient_accumulation_steps": accumulate}
    with mlflow.start_run() as run:
        watched = finetuned(workplace / "a", callback, **options)
        assert mlflow.active_run() is not None
    alone = finetuned(workplace / "b", **options)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    assert logged(run.info.run_id, "watch/gradient_norm") == [1, 2, 3, 4, 5, 6]
    assert logged(run.info.run_id, "watch/directional_sharpness") == [3, 6]
    # Accumulated passes tell the noise at every step, one pass a step only with the probe set.
    steps = [3, 6] if accumulate == 1 else [1, 2, 3, 4, 5, 6]
    assert logged(run.info.run_id, "watch/noise_trace") == steps
    frame = callback.watch.history
    assert ("loss" in frame) == (accumulate == 1)
    assert (frame.gradient_norm <= 1.0 + 1e-5).all()  # clipped at 1 by the Trainer
    assert (frame.gradient_norm_unclipped >= frame.gradient_norm - 1e-6).any()


def alike(theirs: lsa.watching.Watch, own: lsa.watching.Watch) -> None:
    """The same numbers at the same steps."""
    assert len(theirs.rows) == len(own.rows)
    for a, b in zip(theirs.rows, own.rows, strict=True):
        assert a.keys() == b.keys()
        names = a.keys() - {"overhead", "sharpness_residual"}  # a time, and a rounding error
        assert {k: a[k] for k in names} == pytest.approx({k: b[k] for k in names}, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_faces_training_and_its_numbers_are_those_of_a_loop_by_hand(
    workplace: Path, accumulate: int
):
    ids = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(2))
    given: dict[str, Any] = {
        "batches": [{"input_ids": part, "labels": part} for part in ids.split(4)],
        "measure": ["update", "noise", "sharpness"],
        "every": 3, "budget": None, "track": False, "strict": True,
    }  # fmt: skip
    callback = lsa.watching.HuggingFaceCallback(**given)
    theirs = finetuned(workplace, callback, dropout=0.0, gradient_accumulation_steps=accumulate)

    own = language_model(**dict.fromkeys(DROPOUTS, 0.0)).train()
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(42))  # the Trainer's seed
    passes = iter(texts()[order].split(4))
    with lsa.watch(own, optimizer, objective=lsa.objectives.hf(), **given) as watch:
        for _ in range(6):
            step = [next(passes) for _ in range(accumulate)]
            labels = sum(batch.numel() for batch in step)  # the first of a row is counted as well
            for batch in step:
                logits = own(input_ids=batch).logits.flatten(0, 1)
                targets = F.pad(batch, (0, 1), value=-100)[:, 1:].flatten()
                value = F.cross_entropy(logits, targets, reduction="sum") / labels
                value.backward()
                if accumulate == 1:
                    watch.loss(value)
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for a, b in zip(theirs.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    assert callback.watch is not None
    alike(callback.watch, watch)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_a_callback_may_be_sent_to_a_process_and_used_again(workplace: Path):
    ids = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    callback = lsa.watching.HuggingFaceCallback(
        batches=batches, every=3, budget=None, track=False, strict=True
    )
    callback = pickle.loads(pickle.dumps(callback))
    finetuned(workplace / "a", callback)
    first = callback.watch
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.watch.rows == first.rows
    finetuned(workplace / "b", twin)
    numbers = [row["directional_sharpness"] for row in first.rows if "gain" in row]
    again = [row["directional_sharpness"] for row in twin.watch.rows if "gain" in row]
    assert len(numbers) == 2 and again == numbers


def test_an_interrupted_training_is_watched_no_more_when_the_next_begins(workplace: Path):
    """As in a notebook, where the second cell makes another network."""
    transformers = pytest.importorskip("transformers")

    class Interrupts(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given) -> None:
            raise KeyboardInterrupt

    callback = lsa.watching.HuggingFaceCallback(budget=None, track=False, strict=True)
    with pytest.raises(KeyboardInterrupt):
        finetuned(workplace / "a", callback, Interrupts())
    first = callback.watch
    assert first is not None and first.is_open
    finetuned(workplace / "b", callback)
    assert not first.is_open and len(first.rows) == 1
    assert callback.watch is not None and len(callback.watch.rows) == 6


def fitted(folder: Path, *callbacks: Any, module: Any = None, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    lightning.seed_everything(0, verbose=False)
    x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    made = (module or Module)()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[*callbacks],
        log_every_n_steps=2, **{"logger": False, "gradient_clip_val": 0.5} | options,
    )  # fmt: skip
    trainer.fit(made, loader)
    return made, loader


def test_lightning(workplace: Path):
    lightning = pytest.importorskip("lightning")
    _, loader = fitted(workplace)
    callback = lsa.watching.LightningCallback(
        batches=[*loader], every=4, budget=None, log_every=1, strict=True
    )
    uri = mlflow.get_tracking_uri()
    logger = lightning.pytorch.loggers.MLFlowLogger("fits", tracking_uri=uri)
    watched, _ = fitted(workplace, callback, logger=logger)
    alone, _ = fitted(workplace)
    for (name, a), b in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert logged(logger.run_id, "watch/gradient_norm") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged(logger.run_id, "watch/directional_sharpness") == [4, 8]
    frame = callback.watch.history
    assert frame.loss.notna().all()
    assert (frame.gradient_norm <= 0.5 + 1e-5).all()
    before = frame.gradient_norm_unclipped.dropna()
    assert (before > 0.5).any()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_lightning_converts_the_batches(precision: str, workplace: Path):
    """As it does those of the training, whose network is in that precision as a whole."""
    _, loader = fitted(workplace)
    options = {"every": 4, "budget": None, "track": False, "strict": True}
    callback = lsa.watching.LightningCallback(batches=[*loader], **options)
    fitted(workplace, callback, precision=precision)
    assert callback.watch is not None
    assert callback.watch.rows[-1]["directional_sharpness"] > 0


def test_lightnings_training_and_its_numbers_are_those_of_a_loop_by_hand(workplace: Path):
    """With accumulation and clipping."""
    lightning = pytest.importorskip("lightning")
    batches: list[Any] = []

    class Seen(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index) -> None:
            batches.append(batch)

    probes = [(x, torch.arange(8) % 3) for x in torch.linspace(-1, 1, 128).view(4, 8, 4)]
    given: dict[str, Any] = {
        "batches": probes, "measure": ["update", "noise", "sharpness"], "every": 2,
        "budget": None, "track": False, "strict": True,
    }  # fmt: skip
    callback = lsa.watching.LightningCallback(**given)
    theirs, _ = fitted(workplace, callback, Seen(), accumulate_grad_batches=2)

    lightning.seed_everything(0, verbose=False)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    own = Own()
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-2)
    objective = lsa.objectives.lightning()
    with lsa.watch(own, optimizer, objective=objective, **given) as watch:
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            optimizer.zero_grad()
            for x, y in (first, second):
                value = F.cross_entropy(own(x), y)
                watch.loss(value)
                (value / 2).backward()
            nn.utils.clip_grad_norm_(own.parameters(), 0.5)
            optimizer.step()
    assert len(watch.rows) == 4
    for (name, a), b in zip(own.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert callback.watch is not None
    alike(callback.watch, watch)


def test_lightning_tells_the_noise_of_accumulated_passes_and_of_samples(workplace: Path):
    callback = lsa.watching.LightningCallback(budget=None, track=False, strict=True)
    fitted(workplace, callback, accumulate_grad_batches=2)
    assert [row["step"] for row in callback.watch.rows if "noise_trace" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_lightning_tells_the_loss_of_all_passes(workplace: Path, passes: int, scaled: bool):
    lightning = pytest.importorskip("lightning")
    losses = []

    class Seen(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
            losses.append(float(outputs["loss"]) * passes)  # it is that part of the step's

    callback = lsa.watching.LightningCallback(budget=None, track=False, strict=True)
    options: dict[str, Any] = {"accumulate_grad_batches": passes}
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        half = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        options |= {"plugins": [half], "gradient_clip_val": None}
    fitted(workplace, callback, Seen(), **options)
    means = torch.tensor(losses).view(-1, passes).mean(1).tolist()
    assert len(means) == 8 // passes
    assert [row["loss"] for row in callback.watch.rows] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("given", ["nothing", "loss"])
def test_lightning_modules_that_optimize_by_hand_are_measured_by_a_loss_alone(
    workplace: Path, given: str, caplog: pytest.LogCaptureFixture
):
    """Their training_step steps the optimizer."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = perceptron()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            optimizer = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    kinds = ["update", "noise", "noise_of_blocks"]
    options: dict[str, Any] = {"measure": kinds, "every": 3, "budget": None, "track": False}
    options |= {"loss": F.cross_entropy} if given == "loss" else {}
    _, loader = fitted(workplace)
    callback = lsa.watching.LightningCallback(batches=[*loader], strict=True, **options)
    watched, _ = fitted(workplace, callback, module=Module, gradient_clip_val=None)
    alone, _ = fitted(workplace, module=Module, gradient_clip_val=None)
    for a, b in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert callback.watch.step == 8 and len(callback.watch.rows) == 8
    measured = [row["step"] for row in callback.watch.rows if "probe_loss" in row]
    assert measured == ([3, 6] if given == "loss" else [])
    assert ("nothing is measured on batches: training_step" in caplog.text) == (given != "loss")


def test_metrics_of_a_lightning_training_are_those_of_its_own_passes(workplace: Path):
    """A scheduler that waits for one of them does not see the measurements."""
    lightning = pytest.importorskip("lightning")
    torchmetrics = pytest.importorskip("torchmetrics")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.steps, self.seen = perceptron(), 0, []
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
            self.values = torchmetrics.CatMetric()  # whose state is a list

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            outputs = self.net(batch[0])
            loss = F.cross_entropy(outputs, batch[1])
            self.accuracy(outputs, batch[1])
            self.values.update(loss.detach())
            self.steps += 1
            self.seen.append(loss.item())
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.log_dict({"loss": loss, "steps": float(self.steps)}, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class Said(lightning.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            found = {k: float(v) for k, v in trainer.callback_metrics.items()}
            told.append((found, module.steps, module.seen, module.values.compute().tolist()))

    told: list[Any] = []
    fitted(workplace, Said(), module=Module)
    batches = [(x, torch.arange(8) % 3) for x in torch.linspace(-1, 1, 64).view(2, 8, 4)]
    callback = lsa.watching.LightningCallback(
        batches=batches, every=2, budget=None, track=False, strict=True
    )
    fitted(workplace, callback, Said(), module=Module)
    assert told[0] == told[1] and told[0][1] == 8 and {"accuracy", "loss"} <= told[0][0].keys()
    assert sum("probe_loss" in row for row in callback.watch.rows) == 4


def test_fabrics_wrappers_are_seen_through():
    """Its module lets no backward pass but its own, which a measurement's is not."""
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", precision="bf16-mixed")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
    options: dict[str, Any] = {"budget": None, "track": False, "strict": True}
    with lsa.watch(model, optimizer, batches=(x, y), every=1, **options) as watch:
        for _ in range(3):
            exact = torch.autograd.grad(F.cross_entropy(network(x), y), [*network.parameters()])
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            length = float(torch.cat([g.flatten() for g in exact]).norm())
            assert watch.rows[-1]["gradient_norm"] == pytest.approx(length, rel=2e-2)  # bfloat16
            assert watch.rows[-1]["gain_first_order"] == pytest.approx(0.1 * length**2, rel=4e-2)
            assert watch.rows[-1]["noise_trace"] > 0


def test_lookahead_moves_the_weights_further_than_the_optimizer_that_it_holds():
    lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    torch.manual_seed(0)
    model = perceptron()
    optimizer = lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=2)
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    with lsa.watch(model, optimizer, budget=None, track=False, strict=True) as watch:
        for _ in range(4):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            moved = [(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]
            length = float(torch.cat(moved).norm())
            assert watch.rows[-1]["update_norm"] == pytest.approx(length, rel=1e-5)


def test_samples_of_hugging_faces_gpt_2(workplace: Path, caplog: pytest.LogCaptureFixture):
    """Its linear layers are turned, its head is tied, and its positions are all samples'."""
    callback = lsa.watching.HuggingFaceCallback(
        measure=["noise_of_samples"], every=2, budget=None, track=False, strict=True
    )
    finetuned(workplace, callback)
    assert [row["step"] for row in callback.watch.rows if "noise_trace" in row] == [2, 4, 6]
    assert "leaves out transformer.wpe.weight: " in caplog.text

"""Tiny models of other libraries: loss, derivatives and per-sample values against dense oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import rng
from torch import Tensor, nn

import lsa
from lsa import objectives
from lsa.landscape import Landscape, flatten
from lsa.runtime.errors import InputError
from lsa.training import stability

pytestmark = [
    pytest.mark.models,
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),
]
N, T, WORDS = 6, 5, 11
IDS = torch.randint(1, WORDS, (N, T), generator=rng(1))
CLASSES = torch.arange(N) % 3
IMAGES = torch.randn(N, 1, 8, 8, generator=rng(2)).double()


def labels() -> Tensor:
    """Of ragged length, sorted, and one sequence of which nothing counts."""
    found = IDS.clone()
    for i in range(N):
        found[i, 1 + i * T // N :] = -100
    return found


def batches(**data: Tensor) -> list[dict[str, Tensor]]:
    return [{k: v[i:j] for k, v in data.items()} for i, j in ((0, 4), (4, N))]


def made(build: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": WORDS, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = {
        **small, "hidden_size": 4, "intermediate_size": 6, "num_key_value_heads": 1,
        "max_position_embeddings": 8,
    }  # fmt: skip
    builds = {
        "BERT": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(
                **small, hidden_size=4, intermediate_size=6, max_position_embeddings=8,
                num_labels=3,
            )
        ),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=WORDS, n_positions=8, n_embd=4, n_layer=1, n_head=2
            )
        ),
        "Llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**llama, tie_word_embeddings=True)
        ),
        "Mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **{**llama, "hidden_size": 8, "intermediate_size": 8},
                num_local_experts=2, num_experts_per_tok=1,
            )
        ),
        "ViT": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6,
                image_size=8, patch_size=4, num_channels=1, num_labels=3,
            )
        ),
        "Mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=WORDS, hidden_size=4, state_size=2, num_hidden_layers=1,
                conv_kernel=2, time_step_rank=2,
            )
        ),
    }  # fmt: skip
    return made(builds[name])


def logits(f: Any, **inputs: Tensor) -> Tensor:
    return f(**inputs).logits


def check_tokens(model: nn.Module, objective: Any, **options: Any) -> Landscape:
    y = labels()
    total = (y[:, 1:] != -100).sum()

    def each(f: Any) -> Tensor:
        scores = logits(f, input_ids=IDS)[:, :-1].transpose(1, 2)
        return F.cross_entropy(scores, y[:, 1:], reduction="none").sum(1) * N / total

    data = batches(input_ids=IDS, labels=y)
    landscape = Landscape(model, data, objective=objective, **options)
    # Llama computes norms and rotations in float32, whatever its weights are, Mamba its scan.
    rough = "Llama" in str(model) or "Mamba" in str(model)
    agree(
        landscape, landscape.theta, lambda f: each(f).mean(), each, dense=False,
        rounding=1e-5 if rough else 1e-9,
    )  # fmt: skip
    return landscape


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
@pytest.mark.parametrize("objective", [objectives.hf, objectives.per_token])
def test_language_models_by_their_own_loss_and_per_token(name, objective):
    check_tokens(transformer(name), objective())


def test_mamba():
    check_tokens(transformer("Mamba"), objectives.hf())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("copies", [True, False])
def test_gradient_checkpointing(reentrant, copies):
    model = transformer("Llama")
    data = batches(input_ids=IDS, labels=labels())
    plain = Landscape(model, data, objective=objectives.hf())
    theta = plain.theta
    v = torch.randn(len(theta), generator=rng(3)).double()
    wanted = plain.gradient(theta), plain.hessian(theta)(v)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    found = Landscape(model, data, objective=objectives.hf(), copy=copies)
    torch.testing.assert_close(found.gradient(theta), wanted[0])
    torch.testing.assert_close(found.hessian(theta)(v), wanted[1])


def test_a_loss_of_ones_own_on_an_output():
    model = transformer("BERT")

    def own(output: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(output.logits, y)

    def each(f: Any) -> Tensor:
        return F.cross_entropy(f(IDS).logits, CLASSES, reduction="none")

    data = [(IDS[:4], CLASSES[:4]), (IDS[4:], CLASSES[4:])]
    for loss in (own, F.cross_entropy):
        for landscape in (Landscape(model, IDS, CLASSES, loss), Landscape(model, data, loss=loss)):
            agree(landscape, landscape.theta, lambda f: each(f).mean(), each, dense=False)


def test_a_batch_encoding():
    transformers = pytest.importorskip("transformers")
    model, plain = transformer("BERT"), batches(input_ids=IDS, labels=CLASSES)
    encoded = [transformers.BatchEncoding(batch) for batch in plain]
    found, wanted = (Landscape(model, data, objective=objectives.hf()) for data in (encoded, plain))
    assert torch.equal(found.gradient(found.theta), wanted.gradient(found.theta))


def test_an_output_without_logits_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformer("BERT").config
    config.num_labels = 2
    model = made(lambda: transformers.BertForQuestionAnswering(config))
    data = batches(input_ids=IDS, start_positions=CLASSES, end_positions=CLASSES + 1)
    with pytest.raises(InputError, match="gives loss, start_logits, end_logits for batches of"):
        Landscape(model, data, objective=objectives.hf()).loss(flatten(model))


@pytest.mark.parametrize("name", ["BERT", "ViT"])
def test_classifiers_by_their_own_loss(name):
    model = transformer(name)
    inputs = {"input_ids": IDS} if name == "BERT" else {"pixel_values": IMAGES}

    def each(f: Any) -> Tensor:
        return F.cross_entropy(logits(f, **inputs), CLASSES, reduction="none")

    data = batches(**inputs, labels=CLASSES)
    landscape = Landscape(model, data, objective=objectives.hf())
    agree(landscape, flatten(model), lambda f: each(f).mean(), each, dense=False)


def test_a_mixture_of_experts():
    """Its fused kernel takes float32 alone; the oracle is the same model expert by expert."""
    model = transformer("Mixtral").float()
    exact = transformer("Mixtral")
    exact.set_experts_implementation("eager")
    data = batches(input_ids=IDS, labels=labels())
    found, truth = (Landscape(m, data, objective=objectives.per_token()) for m in (model, exact))
    theta = flatten(model)
    v = torch.randn(len(theta), generator=rng(3))
    for name, along in (("gradient", ()), ("losses", ()), ("slopes", (v,)), ("curvatures", (v,))):
        a = getattr(found, name)(theta, *along).double()
        b = getattr(truth, name)(theta.double(), *(u.double() for u in along))
        assert (a - b).norm() < 1e-2 * b.norm(), name
    product = truth.hessian(theta.double())(v.double())
    assert (found.hessian(theta)(v).double() - product).norm() < 1e-2 * product.norm()


@pytest.mark.parametrize(("coefficient", "contained"), [(0.0, False), (1e-5, True), (1.0, True)])
def test_the_auxiliary_loss_of_a_router_is_refused_where_the_loss_contains_it(
    coefficient, contained
):
    model = transformer("Mixtral").float()
    model.config.output_router_logits = True
    model.router_aux_loss_coef = coefficient
    data = [{"input_ids": IDS, "labels": IDS}]
    landscape = Landscape(model, data, objective=objectives.hf())
    if contained:
        with pytest.raises(InputError, match="contains aux_loss, which is no mean over tokens"):
            landscape.loss(landscape.theta)
    else:
        assert landscape.loss(landscape.theta) == pytest.approx(model(**data[0]).loss.item())
    model.config.output_router_logits = False  # as the line says
    landscape = Landscape(model, data, objective=objectives.hf())
    assert landscape.loss(landscape.theta) == pytest.approx(model(**data[0]).loss.item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_language_model_in_half_precision(dtype):
    model = transformer("Llama").to(dtype)
    data = [{"input_ids": IDS, "labels": IDS}]
    for objective in (objectives.hf(), objectives.per_token()):
        landscape = Landscape(model, data, objective=objective)
        assert landscape.loss(landscape.theta) == pytest.approx(
            model(**data[0]).loss.item(), rel=1e-4
        )


def test_prompt_tuning():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    base = transformer("Llama")
    model = made(lambda: peft.get_peft_model(base, config))
    data = [{"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}]
    landscape = Landscape(model, data, objective=objectives.hf())
    loss = model(**data[0]).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained)])
    assert landscape.loss(landscape.theta) == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(landscape.gradient(landscape.theta), own, rtol=1e-4, atol=1e-8)


def test_the_adapters_of_a_frozen_model_alone():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    base = transformer("Llama")
    model = made(lambda: peft.get_peft_model(base, config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=rng(4)) / 4)
    landscape = check_tokens(model, objectives.hf())
    assert landscape.dimension == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all("lora_" in name for name in landscape.unflatten(landscape.theta))


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    options = {"in_chans": 1, "num_classes": 3}
    builds = {
        "vit": lambda: timm.models.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=4, depth=1, num_heads=2, **options
        ),
        "convnext": lambda: timm.models.ConvNeXt(
            depths=(1, 1, 1, 1), dims=(2, 2, 4, 4), patch_size=1, **options
        ),
    }
    model = made(builds[name])

    def each(f: Any) -> Tensor:
        return F.cross_entropy(f(IMAGES), CLASSES, reduction="none")

    landscape = Landscape(model, IMAGES, CLASSES, chunk=4)
    agree(landscape, flatten(model), lambda f: each(f).mean(), each, dense=False)


def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 3))

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = made(Module)
    data = [(IMAGES[:4], CLASSES[:4]), (IMAGES[4:], CLASSES[4:])]
    landscape = Landscape(model, data, objective=objectives.lightning())
    agree(landscape, flatten(model), lambda f: F.cross_entropy(f(IMAGES), CLASSES), dense=False)
    assert landscape.n_samples == 2 and not landscape.has_samples


def test_a_lightning_checkpoint_and_a_callback_in_fit(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh())
            self.last = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.net(x))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    seen: list[Any] = []

    class Measures(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            landscape = lsa.Landscape(module, data)
            (optimizer,) = trainer.optimizers
            found = lsa.preconditioned(landscape, optimizer=optimizer, batch_size=2, k=1)
            seen.append((landscape.theta, found))

    x = IMAGES.float()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, CLASSES), batch_size=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Measures()],
        )  # fmt: skip
        trainer.fit(module, data)
    assert module.training and len(seen) == 2 and torch.equal(seen[1][0], flatten(module))
    assert seen[1][1]["threshold_ratio"].value > 0
    again = Module.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    landscape = Landscape(again.double(), IMAGES, CLASSES)

    def each(f: Any) -> Tensor:
        return F.cross_entropy(f(IMAGES), CLASSES, reduction="none")

    agree(landscape, landscape.theta, lambda f: each(f).mean(), each, dense=False)


def test_wrapped_optimizers_are_looked_into():
    lightning = pytest.importorskip("lightning")
    accelerate = pytest.importorskip("accelerate")
    model = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    F.cross_entropy(model(IMAGES), CLASSES).backward()
    optimizer.step()
    landscape = Landscape(model, IMAGES, CLASSES)
    wanted = stability.read(optimizer, landscape.own_parameters)
    P = wanted.preconditioner(landscape.theta)
    wrapped = (
        lightning.pytorch.core.optimizer.LightningOptimizer(optimizer),
        accelerate.Accelerator(cpu=True).prepare(optimizer),
    )
    assert P is not None
    for wrapper in wrapped:
        found = stability.read(wrapper, landscape.own_parameters)
        own = found.preconditioner(landscape.theta)
        assert own is not None and torch.equal(own.diagonal, P.diagonal)
        assert found.threshold == wanted.threshold

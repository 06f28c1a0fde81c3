"""Tiny models of other libraries: loss, derivatives and per-sample values against dense oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import rng
from torch import Tensor, nn

from lsa import objectives
from lsa.landscape import Landscape, flatten

pytestmark = [
    pytest.mark.models,
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
    # Llama computes norms and rotations in float32, whatever its weights are.
    llama = "Llama" in str(model)
    agree(
        landscape, landscape.theta, lambda f: each(f).mean(), each, dense=False,
        rounding=1e-5 if llama else 1e-9,
    )  # fmt: skip
    return landscape


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
@pytest.mark.parametrize("objective", [objectives.hf, objectives.per_token])
def test_language_models_by_their_own_loss_and_per_token(name, objective):
    check_tokens(transformer(name), objective())


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

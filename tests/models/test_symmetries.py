"""Symmetries of transformers of Hugging Face: planted moves keep the function and are recovered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_transformers import generic
from torch import Tensor, nn

from lsa import objectives
from lsa.landscape import Landscape
from lsa.landscape.aligning import align
from lsa.landscape.recognition import symmetries
from lsa.maths.alignment.random_moves import random_moves
from lsa.maths.alignment.symmetries import transformed

pytestmark = [pytest.mark.models, pytest.mark.full, pytest.mark.filterwarnings("ignore")]
WIDTH, WORDS = 16, 40
IDS = torch.randint(WORDS, (3, 6), generator=torch.Generator().manual_seed(0))


def built(name: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {
        **small, "hidden_size": WIDTH, "intermediate_size": 12, "num_key_value_heads": 2,
        "max_position_embeddings": 8, "pad_token_id": 0,
    }  # fmt: skip
    configs = {
        "GPT-2": lambda: transformers.GPT2Config(
            vocab_size=WORDS, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=4
        ),
        "Llama": lambda: transformers.LlamaConfig(**llama, attention_bias=True),
        "Llama, tied": lambda: transformers.LlamaConfig(**llama, tie_word_embeddings=True),
        "Phi-3": lambda: transformers.Phi3Config(**llama),
        "Qwen3": lambda: transformers.Qwen3Config(**llama, head_dim=4),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = configs[name]()
        config._attn_implementation = attention
        model = transformers.AutoModelForCausalLM.from_config(config)
    for module in list(model.modules()):  # theirs compute in float32, whatever they are given
        for key, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, key, nn.RMSNorm(len(child.weight), eps=1e-6))
    return generic(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "freedom", "pairs"),
    [
        ("GPT-2", "permutation", 0),
        ("Llama", "orthogonal", 2),
        ("Llama, tied", "signed", 2),
        ("Phi-3", "orthogonal", 2),
        ("Qwen3", "orthogonal", 0),
    ],
)
def test_planted_moves_are_recovered(name: str, freedom: str, pairs: int, attention: str) -> None:
    model = built(name, attention)
    batch = {"input_ids": IDS, "labels": IDS}
    at = Landscape(model, [batch], objective=objectives.hf())
    theta = at.theta
    known = symmetries(at, theta)
    assert len(known.spaces) == 3 and len(known.heads) == 2 and not known.left_out
    assert [s.freedom for s in known.spaces if s.size == WIDTH] == [freedom]
    for heads in known.heads:
        assert len(heads.pairs) == pairs
        assert heads.mixes_values and heads.mixes_scores is (name != "Qwen3")

    def outputs(at_theta: Tensor) -> Tensor:
        with at.network.at(at_theta), torch.no_grad():
            return at.network.runner(input_ids=IDS).logits

    rng = torch.Generator().manual_seed(1)
    moved = transformed(known, random_moves(known, rng), at.unflatten(theta))
    other = torch.cat([t.reshape(-1) for t in moved.values()])
    # Attention written out takes its softmax in float32.
    rounding: Any = 1e-10 if attention == "sdpa" else 1e-5
    assert (outputs(other) - outputs(theta)).abs().max() <= rounding
    back = align(at, known, theta, other, rng).end
    assert (back - theta).abs().max() <= 1e-10
    assert (outputs(back) - outputs(theta)).abs().max() <= 1e-10

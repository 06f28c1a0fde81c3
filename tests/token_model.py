"""The text of a module with a language model and batches; λ_max as `lsa lanczos` prints it."""

from __future__ import annotations

# Of each batch another number of labels counts.
SOURCE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, width), nn.Linear(width, 7)
    def forward(self, input_ids):
        return self.head(torch.tanh(self.embedding(input_ids)))

def texts():
    made = []
    for i, n in enumerate((3, 5, 2)):
        ids = torch.randint(0, 7, (n, 6), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[0, 2 + i:] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made, made[:1]
"""


def printed(out: str) -> float:
    """λ_max among the lines of a measurement."""
    (line,) = (line for line in out.splitlines() if line.startswith("lanczos/lambda_max "))
    return float(line.split()[1])

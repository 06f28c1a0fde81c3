"""A module of somebody else's, with a data set and a network, and a study of what it trained."""

from __future__ import annotations

NAME = "work_of_theirs"
PARTS = """
import torch
from torch import nn

def waves(n=60):
    x = torch.linspace(-1, 1, n)[:, None]
    return (x, torch.sin(3 * x)), (x[::3], torch.sin(3 * x[::3]))

def line(width=8, act="tanh"):
    between = nn.Tanh() if act == "tanh" else nn.ReLU()
    return nn.Sequential(nn.Linear(1, width), between, nn.Linear(width, 1))
"""


def study(*checkpoints: str, seeds: list[int]) -> str:
    """A project of lsa's own SGD and of their checkpoints, one for each seed."""
    return f"""
dataset: {{name: "{NAME}:waves"}}
model: {{name: "{NAME}:line"}}
loss: {{name: MSELoss}}
train: {{epochs: 1, batch_size: 20}}
optimizers:
  sgd: {{name: SGD, lr: 0.05}}
  theirs: {{checkpoints: [{", ".join(checkpoints)}]}}
seeds: {seeds}
landscape: {{samples: all}}
probes: {{lanczos: {{k: 1, density_probes: 0}}}}
pairs: {{interpolation: {{points: 5}}}}
"""

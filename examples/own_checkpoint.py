"""A network that your own loop trained, registered, and measured by its run."""

import torch
from torch import nn

import lsa


def data():
    """Both splits."""
    x = torch.linspace(-1, 1, 500)[:, None]
    return (x[::2], torch.sin(5 * x[::2])), (x[1::2], torch.sin(5 * x[1::2]))


def make(width=32):  # noqa: D103
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


if __name__ == "__main__":
    torch.manual_seed(0)
    model, ((x, y), _) = make(width=16), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    named = {"factory": {"name": "own_checkpoint:make", "width": 16}, "data": "own_checkpoint:data"}
    step = lsa.register(model, **named, loss="MSELoss", optimizer=optimizer, project="waves")
    done = lsa.measure("lanczos", lsa.load(step.run_id, trust=["own_checkpoint"]))
    print(f"lambda_max {done['lambda_max'].value:.4g}")

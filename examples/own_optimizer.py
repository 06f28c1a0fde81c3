"""How near a live optimizer is to its edge, and the rule of an optimizer of your own."""

import torch
from torch import nn

import lsa

torch.manual_seed(0)
x, y = torch.randn(500, 4), torch.randn(500, 1)
model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))


class Halved(torch.optim.SGD):
    """Stands for a class of yours that divides its steps by 2."""


@lsa.preconditioner(Halved)
def _(parameter, group, state):
    return lsa.Rule(P=torch.full_like(parameter, 2.0), threshold=2 / group["lr"], formula="2/η")


groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
for optimizer in (torch.optim.AdamW(groups, lr=0.005), Halved(model.parameters(), lr=0.1)):
    nn.MSELoss()(model(x), y).backward()
    optimizer.step()
    landscape = lsa.Landscape(model, x, y, nn.MSELoss())
    result = lsa.preconditioned(landscape, optimizer=optimizer)
    print(type(optimizer).__name__, f"{result.metrics['threshold_ratio'].value:.3g}")

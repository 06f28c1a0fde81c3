"""The Hessian spectrum of your own model, on your own data and loss: no project, no tracking."""

import torch
from torch import nn

import lsa

torch.manual_seed(0)
x = torch.randn(500, 4)
y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(500, 1)
model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
loss = nn.SmoothL1Loss()  # a mean over samples: (outputs, targets) → scalar

optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(300):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

landscape = lsa.Landscape(model, x, y, loss)
result = lsa.lanczos(landscape, k=2)
for name, metric in result.metrics.items():
    errors = "".join(f" ± {error:.2g} ({source})" for source, error in metric.errors.items())
    print(f"{name:24} {metric.value:.4g}{errors} {metric.unit}")

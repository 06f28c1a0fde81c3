"""Energies for path searches: potentials with known saddles, and a small classifier."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

F64 = torch.float64


class MullerBrown:
    """Müller & Brown 1979: minima −146.6995 and −108.1667, highest saddle between them −40.6648."""

    minima = (-146.69951720995402, -108.16672411685236)
    saddle = -40.664843508657405

    def __init__(self) -> None:
        self.A, self.a, self.b, self.c, self.x0, self.y0 = torch.tensor(
            [
                [-200.0, -100.0, -170.0, 15.0],
                [-1.0, -1.0, -6.5, 0.7],
                [0.0, 0.0, 11.0, 0.6],
                [-10.0, -10.0, -6.5, 0.7],
                [1.0, 0.0, -0.5, -1.0],
                [0.0, 0.5, 1.5, 1.0],
            ],
            dtype=F64,
        )

    def __call__(self, p: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        x, y = p[:, :1] - self.x0, p[:, 1:] - self.y0
        terms = self.A * torch.exp(self.a * x**2 + self.b * x * y + self.c * y**2)
        slope_x = (terms * (2 * self.a * x + self.b * y)).sum(1)
        slope_y = (terms * (self.b * x + 2 * self.c * y)).sum(1)
        return terms.sum(1), torch.stack([slope_x, slope_y], dim=1)

    def dense(self, p: Tensor) -> Tensor:
        return self(p)[0]

    def ends(self) -> tuple[Tensor, Tensor]:
        """The two deepest minima, by gradient descent."""
        p = torch.tensor([[-0.558, 1.442], [0.623, 0.028]], dtype=F64)
        for _ in range(300):
            p = p - 3e-4 * self(p)[1]
        return p[0], p[1]


class CurvedWell:
    """V = (1−x²)² + a(y + x² − 1)² + ½∑ kᵢ zᵢ², rotated into R^d, between x = ∓1.

    Every path crosses x = 0, where V ≥ 1, and the parabola y = 1 − x² attains it: the minimax is
    exactly 1. The straight line y = 0 has its maximum 1 + a in the middle.
    """

    def __init__(self, a: float = 4.0, d: int = 50) -> None:
        rng = torch.Generator().manual_seed(0)
        self.Q = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=F64))[0]
        self.a, self.k = a, torch.linspace(0.5, 3, d - 2, dtype=F64)
        self.calls: list[tuple[int, int]] = []  # (step, points) of every call

    def __call__(self, p: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        self.calls.append((step, len(p)))
        q = p @ self.Q
        x, y, z = q[:, 0], q[:, 1], q[:, 2:]
        u = y + x**2 - 1
        g = torch.cat(
            [
                torch.stack([4 * x * (x**2 - 1) + 4 * self.a * u * x, 2 * self.a * u], 1),
                self.k * z,
            ],
            1,
        )
        energies = (1 - x**2) ** 2 + self.a * u**2 + 0.5 * (self.k * z**2).sum(1)
        return energies, g @ self.Q.T

    def dense(self, p: Tensor) -> Tensor:
        energies = self(p)[0]
        self.calls.pop()
        return energies

    def ends(self) -> tuple[Tensor, Tensor]:
        return -self.Q[:, 0], self.Q[:, 0].clone()


class FourWells:
    """V = low (1−x²)² + high (1−y²)² + ½∑ kᵢ zᵢ², rotated into R^d: minima (±1, ±1) with V = 0.

    The terms do not see each other, so the minimax between neighbours along x is exactly `low`,
    and `high` between all others; the straight line along a diagonal reaches low + high.
    """

    def __init__(self, low: float, high: float, d: int = 20) -> None:
        rng = torch.Generator().manual_seed(1)
        self.Q = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=F64))[0]
        self.heights = torch.tensor([low, high], dtype=F64)
        self.k = torch.linspace(0.5, 3, d - 2, dtype=F64)

    def __call__(self, p: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        q = p @ self.Q
        xy, z = q[:, :2], q[:, 2:]
        energies = (self.heights * (1 - xy**2) ** 2).sum(1) + 0.5 * (self.k * z**2).sum(1)
        slopes = torch.cat([4 * self.heights * xy * (xy**2 - 1), self.k * z], 1)
        return energies, slopes @ self.Q.T

    def dense(self, p: Tensor) -> Tensor:
        return self(p)[0]

    def ends(self) -> Tensor:
        """The minima (−1, −1), (1, −1), (−1, 1), (1, 1), as rows."""
        x, y = self.Q[:, 0], self.Q[:, 1]
        return torch.stack([-x - y, x - y, y - x, x + y])

    def same_row(self) -> np.ndarray:
        """Whether two minima are neighbours along x, `(4, 4)`."""
        row = np.array([0, 0, 1, 1])
        return row[:, None] == row


class SmallClassifier:
    """Cross-entropy of a two-layer tanh network on three fixed clusters, over flat parameters."""

    inputs, hidden, classes, samples = 2, 8, 3, 60

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.y = torch.arange(self.samples) % self.classes
        centres = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]], dtype=F64)
        noise = torch.randn(self.samples, self.inputs, generator=rng, dtype=F64)
        self.x = centres[self.y] + 0.4 * noise
        self.shapes = [
            (self.hidden, self.inputs),
            (self.hidden,),
            (self.classes, self.hidden),
            (self.classes,),
        ]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.head = torch.arange(sum(self.sizes)) >= sum(self.sizes[:2])

    def layers(self, p: Tensor) -> list[Tensor]:
        """Weights and biases of every row of `p`, (P, …) each."""
        parts = p.split(self.sizes, dim=1)
        return [x.view(-1, *shape) for x, shape in zip(parts, self.shapes, strict=True)]

    def dense(self, p: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.layers(p)
        hidden = torch.tanh(self.x @ w1.mT + b1[:, None])
        log_p = (hidden @ w2.mT + b2[:, None]).log_softmax(-1)
        return -log_p[:, torch.arange(self.samples), self.y].mean(1)

    def __call__(self, p: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        leaf = p.detach().requires_grad_()
        energies = self.dense(leaf)
        return energies, torch.autograd.grad(energies.sum(), leaf)[0]

    def trained(self, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        theta = torch.randn(1, sum(self.sizes), generator=rng, dtype=F64)
        for _ in range(300):
            theta = theta - 0.5 * self(theta)[1]
        return theta[0]

    def permuted(self, theta: Tensor, seed: int) -> Tensor:
        """The same function with its hidden units in another order."""
        order = torch.randperm(self.hidden, generator=torch.Generator().manual_seed(seed))
        w1, b1, w2, b2 = (x[0] for x in self.layers(theta[None]))
        return torch.cat([x.flatten() for x in (w1[order], b1[order], w2[:, order], b2)])

"""Random changes of a transformer's weights that keep its function."""

from __future__ import annotations

import torch
from torch import Tensor

from lsa.maths.alignment.symmetries import HeadMove, Heads, Move, Order, Space, Symmetries


def random_moves(
    symmetries: Symmetries, rng: torch.Generator, *, stretch: float = 0.3
) -> dict[str, Move]:
    """A random move of every part.

    Args:
        symmetries: Of the network.
        rng: On the CPU.
        stretch: Maps of heads scale a coordinate by a factor between e^−stretch and e^stretch. At
            the default of 0.3 the maps are well conditioned.

    Returns:
        Name of a part → its move, in float64.
    """
    return {
        name: _random_space(part, rng)
        if isinstance(part, Space)
        else _random_heads(part, rng, stretch)
        for name, part in symmetries.parts.items()
    }


def _random_space(space: Space, rng: torch.Generator) -> Move:
    n = space.size
    if space.freedom == "orthogonal":
        return _rotation(n, rng)
    if space.freedom == "centred":
        ones = torch.ones(n, 1, dtype=torch.float64)
        basis = torch.linalg.qr(torch.cat([ones, torch.eye(n, n - 1).double()], 1)).Q
        rest = basis[:, 1:]
        return rest @ _rotation(n - 1, rng) @ rest.T + ones @ ones.T / n
    signs = torch.ones(n, dtype=torch.float64)
    if space.freedom == "signed":
        signs = torch.randint(2, (n,), generator=rng).double() * 2 - 1
    return Order(torch.randperm(n, generator=rng), signs)


def _rotation(n: int, rng: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q


def _random_heads(heads: Heads, rng: torch.Generator, stretch: float) -> HeadMove:
    groups, r, m, n = heads.shape
    move = HeadMove(
        torch.randperm(groups, generator=rng),
        torch.stack([torch.randperm(r, generator=rng) for _ in range(groups)]),
        *(torch.eye(size).double().repeat(groups, 1, 1) for size in (m, n)),
    )
    rest = heads.unpaired
    for g in range(groups):
        if heads.mixes_values:
            move.ov[g] = _invertible(n, rng, stretch)
        if not heads.mixes_scores:
            continue
        move.qk[g][rest[:, None], rest] = _invertible(len(rest), rng, stretch)
        for pair in heads.pairs:
            turn, scale = torch.rand(2, generator=rng).double().tolist()
            c, s = (f(torch.tensor(6.3 * turn)).item() for f in (torch.cos, torch.sin))
            factor = torch.tensor(stretch * (2 * scale - 1)).exp().item()
            move.qk[g][pair[:, None], pair] = factor * torch.tensor([[c, -s], [s, c]]).double()
    return move


def _invertible(n: int, rng: torch.Generator, stretch: float) -> Tensor:
    scales = (stretch * (2 * torch.rand(n, generator=rng).double() - 1)).exp()
    return _rotation(n, rng) * scales @ _rotation(n, rng)

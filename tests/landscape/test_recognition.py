"""Symmetries of transformers: recognised without names, kept functions, planted moves recovered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_transformers import IDS, NETWORKS, SHAPE, WORDS, landscape, made
from tiny import seeded
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.aligning import align, alignable
from lsa.landscape.recognition import symmetries
from lsa.maths.alignment.random_moves import random_moves
from lsa.maths.alignment.symmetries import (
    Heads,
    Space,
    Symmetries,
    TensorAxis,
    gains,
    transformed,
    with_gains,
)
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
D = SHAPE.width
# What is free in the residual stream; pairs of coordinates that the position turns in a head.
EXPECTED = {
    "tied head": ("permutation", 0),
    "own head": ("centred", 0),
    "RMS norms": ("signed", 0),
    "rotary": ("orthogonal", 2),
    "rotary, tied": ("signed", 2),
    "rotary, written out": ("orthogonal", 2),
    "encoder": ("centred", 0),  # the head takes the stream by a linear map, which takes any turn
    "encoder, norms behind": ("permutation", 0),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def outputs(at: Landscape, theta: Tensor) -> Tensor:
    with torch.no_grad():
        return at.outputs(theta, IDS)


def planted(at: Landscape, known: Symmetries) -> Tensor:
    """θ after a random move of every part, with other gains of norms."""
    rng = generator(1)
    moved = transformed(known, random_moves(known, rng), at.unflatten(at.theta))
    other = {
        n: g * (0.5 + torch.rand(g.shape, generator=rng)) for n, g in gains(known, moved).items()
    }
    return joined(with_gains(known, moved, other))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_free_is_recognised(name: str) -> None:
    at = landscape(made(name))
    known = symmetries(at, at.theta)
    freedom, pairs = EXPECTED[name]
    (stream,) = [s for s in known.spaces if s.size == D]
    assert stream.freedom == freedom
    hidden = [s for s in known.spaces if s.size != D]
    assert [s.freedom for s in hidden] == ["permutation"] * 2
    assert len(known.heads) == 2
    groups = 2 if "rotary" in name else 4
    for heads in known.heads:
        assert heads.shape == (groups, 4 // groups, D // 4, D // 4)
        assert len(heads.pairs) == pairs
        assert heads.mixes_scores and heads.mixes_values
    assert known.left_out == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_planted_moves_are_recovered_to_rounding(name: str) -> None:
    at = landscape(made(name))
    theta = at.theta
    known = symmetries(at, theta)
    moved = planted(at, known)
    assert (moved - theta).norm() > 0.5 * theta.norm()
    scale = outputs(at, theta).abs().max()
    assert (outputs(at, moved) - outputs(at, theta)).abs().max() <= 1e-10 * scale
    back = align(at, known, theta, moved, generator(2))
    assert back.converged
    assert back.units_moved > 0.5
    assert (back.end - theta).abs().max() <= 1e-10
    assert (outputs(at, back.end) - outputs(at, theta)).abs().max() <= 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_keeps_its_function_and_comes_nearer(name: str) -> None:
    at, other = landscape(made(name)), landscape(made(name, seed=1))
    a, b = at.theta, other.theta
    best = align(at, symmetries(at, a), a, b, generator())
    assert (outputs(at, best.end) - outputs(at, b)).abs().max() <= 1e-10
    assert (best.end - a).norm() < (b - a).norm()


def test_every_part_is_at_its_optimum() -> None:
    """No random small turn of any part raises the inner product with A."""
    at = landscape(made("rotary"))
    known = symmetries(at, at.theta)
    a = at.unflatten(at.theta)
    b = at.unflatten(flatten(made("rotary", seed=1)))
    # With gains of one, and heads that cannot be scaled, the distance is what is made small.
    a, b = (with_gains(known, t, None) for t in (a, b))
    fixed = replace(
        known,
        heads=tuple(replace(h, mixes_scores=False, mixes_values=False) for h in known.heads),
    )
    best = align(at, fixed, joined(a), joined(b), generator()).end
    nearest = (best - joined(a)).norm()
    for seed in range(20):
        rng = generator(seed)
        for part in fixed.parts.values():
            alone = Symmetries(*(((part,), ()) if isinstance(part, Space) else ((), (part,))))
            turned = transformed(alone, random_moves(alone, rng), at.unflatten(best))
            assert (joined(turned) - joined(a)).norm() >= nearest - 1e-9


def test_gains_near_zero_leave_a_stream_its_coordinates() -> None:
    at = landscape(made("rotary"))
    known = symmetries(at, at.theta)
    b = flatten(made("rotary", seed=1))
    at.unflatten(b)["norms.1.weight"][3] = 0.0
    best = align(at, known, at.theta, b, generator())
    assert best.end.isfinite().all()
    assert (outputs(at, best.end) - outputs(at, b)).abs().max() <= 1e-10


def test_a_frozen_parameter_is_said() -> None:
    model = made("tied head")
    model.get_parameter("blocks.0.up.weight").requires_grad_(False)
    at = landscape(model)
    known = symmetries(at, at.theta)
    assert len(known.heads) == 2
    assert [s.name for s in known.spaces] == ["units of blocks.1.up.weight"]
    lines = [line for line in known.left_out if "blocks.0.up.weight is frozen" in line]
    assert len(lines) == 2  # the stream, and the units of that layer
    _, notes = alignable(at, at.theta)
    assert all(note.startswith("not aligned: ") for note in notes) and len(notes) == 2


class Declared(nn.Module):
    """Units that pass an operation that is not known to keep them apart, though it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.first.weight.view(-1)[ids.unsqueeze(-1) * 8 + torch.arange(8)]
        return self.second(torch.tanh(hidden))


def test_symmetries_can_be_declared_and_are_tried() -> None:
    model = seeded(Declared)
    at = landscape(model)
    with pytest.raises(InputError, match="no symmetry of this network was recognised"):
        symmetries(at, at.theta)
    axes = (TensorAxis("first.weight", 1), TensorAxis("second.weight", 1))
    right = Space("units", 8, axes, freedom="signed")
    wrong = Space("half", 8, axes[:1])
    model.symmetries = Symmetries((right, wrong))  # pyright: ignore
    at = landscape(model)
    known = symmetries(at, at.theta)
    assert known.spaces == (right,)
    assert known.left_out == ("half are left as they are: a change of them is no symmetry",)
    moved = joined(transformed(known, random_moves(known, generator()), at.unflatten(at.theta)))
    back = align(at, known, at.theta, moved, generator())
    assert (back.end - at.theta).abs().max() <= 1e-12
    model.symmetries = {"first": "second"}  # pyright: ignore
    at = landscape(model)
    with pytest.raises(InputError, match="attribute symmetries is a dict"):
        symmetries(at, at.theta)


def test_heads_with_a_norm_of_their_own_keep_the_coordinates_of_scores() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.norm = nn.RMSNorm(4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            return self.head(x + self.o(y.transpose(1, 2).flatten(2)))

    at = landscape(seeded(Normed))
    (heads,) = symmetries(at, at.theta).heads
    assert isinstance(heads, Heads)
    assert (heads.mixes_scores, heads.mixes_values) == (False, True)

"""Planes against closed forms: norms of filters, coordinates, planted components, a random walk."""

from __future__ import annotations

import pytest
import torch

from lsa.maths.planes import Plane, filter_normalised, principal, random_walk_shares, through
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights() -> dict[str, torch.Tensor]:
    rng = generator(1)
    shapes = {"conv": (4, 3, 2, 2), "bias": (4,), "linear": (5, 6), "narrow": (3, 1)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def parts(direction: torch.Tensor, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    split = direction.split([w.numel() for w in named.values()])
    return {name: d.view_as(w) for (name, w), d in zip(named.items(), split, strict=True)}


def test_every_filter_of_a_direction_has_the_norm_of_the_weights_filter():
    named = weights()
    named["linear"][2] = 0  # a dead neuron stays where it is
    draw = torch.randn(sum(w.numel() for w in named.values()), generator=generator())
    found = parts(filter_normalised(named, draw), named)
    for name in ("conv", "linear", "narrow"):
        expected, norms = (t[name].flatten(1).norm(dim=1) for t in (named, found))
        torch.testing.assert_close(norms, expected)
    assert not found["bias"].any()  # as the authors leave out biases and batch norm
    # within a filter it points where the draw points
    raw = parts(draw, named)["conv"].flatten(1)
    cosines = torch.cosine_similarity(raw, found["conv"].flatten(1))
    torch.testing.assert_close(cosines, torch.ones(4))


def test_two_directions_are_orthogonal_in_every_filter_that_has_room():
    named = weights()
    first, second = torch.randn(2, sum(w.numel() for w in named.values()), generator=generator())
    u = filter_normalised(named, first)
    v = filter_normalised(named, second, against=u)
    for name in ("conv", "linear"):
        a, b = (parts(d, named)[name].flatten(1) for d in (u, v))
        torch.testing.assert_close((a * b).sum(1), torch.zeros(len(a)), rtol=0, atol=1e-6)
        torch.testing.assert_close(b.norm(dim=1), named[name].flatten(1).norm(dim=1))
    assert parts(v, named)["narrow"].abs().min() > 0  # one weight has one direction


def test_three_points_are_found_at_their_coordinates():
    """A triangle with sides 3, 4 and 5, moved and turned into 20 dimensions."""
    rng = generator()
    basis = torch.linalg.qr(torch.randn(20, 2, generator=rng, dtype=torch.float64)).Q
    a = torch.randn(20, generator=rng, dtype=torch.float64)
    b, c = a + 3 * basis[:, 0], a + 4 * basis[:, 1]
    plane = through(a, b, c)
    torch.testing.assert_close(
        plane.directions.T @ plane.directions, torch.eye(2, dtype=torch.float64)
    )
    for point, expected in ((a, (0, 0, 0)), (b, (3, 0, 0)), (c, (0, 4, 0))):
        assert plane.coordinates(point) == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(plane.at(*expected[:2]), point)
    assert plane.at(0, 0) is a


def test_distance_from_a_plane_with_skew_directions():
    directions = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    plane = Plane(torch.zeros(3), directions)
    assert plane.coordinates(torch.tensor([3.0, 4.0, 5.0])) == pytest.approx((1, 2, 5))


@pytest.mark.parametrize("t", [0.0, 1.0, 0.4])
def test_points_on_a_line_have_no_plane(t):
    a, b = torch.randn(2, 8, generator=generator())
    with pytest.raises(InputError, match="on a line"):
        through(a, b, torch.lerp(a, b, t))
    with pytest.raises(InputError, match="on a line"):
        through(a, a, b)


def test_planted_components_are_found():
    """Points on an ellipse of half-axes 5 and 2 with a little noise in all other directions."""
    rng = generator()
    basis = torch.linalg.qr(torch.randn(100, 2, generator=rng, dtype=torch.float64)).Q
    angles = torch.linspace(0, 2 * torch.pi, 9, dtype=torch.float64)[:-1]
    flat = torch.stack([5 * angles.cos(), 2 * angles.sin()], 1) @ basis.T
    noise = 1e-4 * torch.randn(8, 100, generator=rng, dtype=torch.float64)
    plane, shares = principal(list(flat + noise + 7))
    overlap = (basis.T @ plane.directions).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-3)
    # the variances along an ellipse are its half-axes squared over two
    torch.testing.assert_close(
        shares[:2], torch.tensor([25, 4], dtype=torch.float64) / 29, rtol=1e-4, atol=0
    )
    assert plane.origin.equal((flat + noise + 7)[-1])
    x, y, distance = plane.coordinates((flat + noise + 7)[0])
    assert x > 0 and y >= 0 and 0 < distance < 0.01


def test_a_random_walk_has_the_shares_that_it_is_said_to_have():
    walk = torch.randn(60, 20_000, generator=generator(), dtype=torch.float64).cumsum(0)
    _, shares = principal(list(walk))
    expected = random_walk_shares(60)
    torch.testing.assert_close(shares[:3], expected[:3], rtol=0.03, atol=0)
    # of many points: 6/(π²k²) (Antognini & Sohl-Dickstein 2018)
    many = random_walk_shares(5000)[:3] * torch.pi**2 / 6 * torch.arange(1.0, 4.0) ** 2
    torch.testing.assert_close(many, torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_points_have_no_principal_plane(n):
    with pytest.raises(InputError, match="a plane needs three"):
        principal(list(torch.randn(n, 5, generator=generator())))


def test_a_scaled_layer_has_a_scaled_direction():
    named = weights()
    draw = torch.randn(sum(w.numel() for w in named.values()), generator=generator())
    plain = filter_normalised(named, draw)
    scaled = filter_normalised({name: 7 * w for name, w in named.items()}, draw)
    torch.testing.assert_close(scaled, 7 * plain)

"""Which units may be renumbered, and whether matching finds the best renumbering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations as orders
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lsa.maths.alignment.permutations import (
    Permutations,
    PermutationSpec,
    apply,
    identity_permutations,
    permutation_spec,
    random_permutations,
    weight_matching,
)
from lsa.runtime.errors import InputError
from lsa.training import models

Tensors = Mapping[str, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, no tensor left constant (as norms are at first)."""
    rng, model = generator(seed), model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            values = torch.rand(tensor.shape, generator=rng, dtype=torch.float64) + 0.5
            tensor.copy_(values if name.endswith("var") else values - 0.8)
        elif tensor.is_floating_point():
            scale = tensor[0].numel() ** -0.5
            tensor.copy_(scale * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))
    return model


def build(name: str, shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> nn.Module:
    return randomised(models.build(name, input_shape=shape, classes=10, seed=0, **options))


def similarity(spec: PermutationSpec, a: Tensors, b: Tensors) -> float:
    """⟨θ_A, θ_B⟩ over the parameters that can be permuted."""
    return sum((a[n] * b[n]).sum().item() for n in spec.axes if n not in spec.buffers)


def all_permutations(spec: PermutationSpec) -> list[Permutations]:
    choices = [[torch.tensor(o) for o in orders(range(n))] for n in spec.sizes.values()]
    return [dict(zip(spec.sizes, chosen, strict=True)) for chosen in product(*choices)]


# --- specs of the package's networks --------------------------------------------------------------


def test_spec_of_a_convolutional_network() -> None:
    spec = permutation_spec(build("simple_cnn", width=4))
    assert spec.sizes == {"0": 4, "3": 8, "6": 4, "10": 32}
    assert set(spec.axes) == {f"{i}.{w}" for i in (0, 3, 6, 10) for w in ("weight", "bias")} | {
        "12.weight"
    }
    assert spec.buffers == frozenset()


def test_flattened_maps_repeat_units_over_positions() -> None:
    spec = permutation_spec(build("simple_cnn", (1, 32, 32), width=4))  # 4 × 4 positions are left
    columns = next(axis for axis in spec.axes["10.weight"] if axis.dim == 1)
    assert torch.equal(columns.positions["6"], torch.arange(64).view(4, 16))


def test_spec_of_a_fully_connected_network() -> None:
    spec = permutation_spec(build("mlp", hidden=(7, 5)))
    assert spec.sizes == {"1": 7, "3": 5}
    assert {n: [a.dim for a in axes] for n, axes in spec.axes.items()} == {
        "1.weight": [0],
        "1.bias": [0],
        "3.weight": [1, 0],
        "3.bias": [0],
        "5.weight": [1],
    }


def test_zero_padded_shortcuts_tie_the_stages() -> None:
    # Option A: the second stage's stream is 2 new channels, the 4 of the first, 2 new channels.
    spec = permutation_spec(build("resnet20", width=4))
    streams = {"0": 4, "6.conv2": 4, "9.conv2": 8}
    inner = {f"{block}.conv1": 4 * 2 ** ((block - 3) // 3) for block in range(3, 12)}
    assert spec.sizes == streams | inner
    (rows,) = (axis for axis in spec.axes["6.conv2.weight"] if axis.dim == 0)
    assert rows.positions["0"].flatten().tolist() == [2, 3, 4, 5]
    assert rows.positions["6.conv2"].flatten().tolist() == [0, 1, 6, 7]
    assert {"1.running_mean", "6.norm2.running_var"} < spec.buffers


def test_a_network_without_hidden_units_has_nothing_to_permute() -> None:
    model = build("mlp", hidden=())
    spec = permutation_spec(model)
    assert spec.sizes == {}
    matched = weight_matching(spec, model.state_dict(), model.state_dict(), generator())
    assert matched.permutations == {} and matched.converged


# --- the function is preserved, for many structures -----------------------------------------------


class Functional(nn.Module):
    """A module whose forward pass is the given function of itself and x."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(channels: int, out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "simple_cnn": lambda: build("simple_cnn", (2, 8, 8), width=4),
    "simple_cnn, positions": lambda: build("simple_cnn", (2, 20, 20), width=4),
    "mlp": lambda: build("mlp", (2, 8, 8), hidden=(9, 7), activation="tanh"),
    "resnet20": lambda: build("resnet20", (2, 8, 8), width=4),
    "depthwise": lambda: nn.Sequential(
        conv(2, 4), conv(4, 8, groups=4), nn.ReLU(), conv(8, 3), nn.Flatten(), nn.Linear(192, 3)
    ),
    "norms": lambda: nn.Sequential(
        conv(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(4),
        nn.Flatten(),
        nn.BatchNorm1d(256),
        nn.Linear(256, 6),
        nn.LayerNorm(6),
        nn.PReLU(),
        nn.Linear(6, 3),
    ),
    "concatenation": lambda: Functional(
        lambda m, x: m.last(torch.cat([m.one(x), F.relu(m.two(x)), m.one(x)], 1)).mean((2, 3)),
        one=conv(2, 4),
        two=conv(2, 5),
        last=conv(13, 3),
    ),
    "squeeze and excitation": lambda: Functional(
        lambda m, x: m.last(m.one(x) * torch.sigmoid(m.gate(F.adaptive_avg_pool2d(m.one(x), 1)))),
        one=conv(2, 4),
        gate=nn.Conv2d(4, 4, 1),
        last=conv(4, 2),
    ),
    "a layer used twice": lambda: Functional(
        lambda m, x: m.last(m.again(F.relu(m.again(F.relu(m.first(x)))))),
        first=conv(2, 4),
        again=conv(4, 4),
        last=conv(4, 2),
    ),
    "residual stream": lambda: Functional(
        lambda m, x: m.last(
            (h := m.first(x.flatten(1))) + F.gelu(m.inner(h)) + 0.5 * m.square(h) - h / 3
        ),
        first=nn.Linear(128, 5),
        inner=nn.Linear(5, 5),
        square=nn.Linear(5, 5),
        last=nn.Linear(5, 3),
    ),
    "sum with the input": lambda: Functional(
        lambda m, x: m.last(F.relu(m.one(x)) + x), one=conv(2, 2), last=conv(2, 3)
    ),
    "shape": lambda: Functional(
        lambda m, x: m.last(m.one(x).reshape(x.shape[0], -1)),
        one=conv(2, 4),
        last=nn.Linear(256, 3),
    ),
    "view": lambda: Functional(
        lambda m, x: m.last(F.max_pool2d(m.one(x), 2).view(x.size(0), -1)),
        one=conv(2, 4),
        last=nn.Linear(64, 3),
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_permuted_networks_compute_the_same(structure: str) -> None:
    model = randomised(STRUCTURES[structure]())
    x = torch.randn(3, 2, *((20, 20) if "positions" in structure else (8, 8)), dtype=torch.float64)
    tensors, spec = model.state_dict(), permutation_spec(model)
    expected = model(x)
    rolled = {group: torch.arange(n).roll(1) for group, n in spec.sizes.items()}
    for permutations in (rolled, random_permutations(spec, generator(1))):
        moved = apply(spec, permutations, tensors)
        assert list(moved) == list(tensors)
        error = (functional_call(model, moved, (x,)) - expected).abs().max()
        assert error <= 1e-12 * expected.abs().max()
    moved = apply(spec, rolled, tensors)
    assert not any(torch.equal(moved[name], tensors[name]) for name in spec.axes)


def test_units_summed_with_the_input_are_fixed() -> None:
    assert permutation_spec(STRUCTURES["sum with the input"]()).sizes == {}


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
@pytest.mark.slow
def test_torchvision_classifiers(name: str) -> None:
    model = build(name, (3, 32, 32))
    tensors, spec = model.state_dict(), permutation_spec(model)
    moved = apply(spec, random_permutations(spec, generator(1)), tensors)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    error = (functional_call(model, moved, (x,)) - expected).abs().max()
    assert error <= 1e-10 * expected.abs().max()


def test_a_wrong_order_changes_the_function() -> None:
    # The check above can fail: one group moved in its first layer only.
    model = build("mlp", hidden=(6,))
    spec = permutation_spec(model)
    moved = apply(spec, {"1": torch.arange(6).roll(1)}, model.state_dict())
    moved["3.weight"] = model.state_dict()["3.weight"]
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert (functional_call(model, moved, (x,)) - model(x)).abs().max() > 1e-2


# --- what is refused ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group norm": (lambda: build("resnet20", width=8, norm="group"), "GroupNorm"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), "Softmax"),
    "grouped": (lambda: nn.Sequential(conv(2, 4), conv(4, 4, groups=2)), "grouped Conv2d"),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        "reparametrised",
    ),
    "linear over positions": (lambda: nn.Sequential(conv(2, 4), nn.Linear(8, 2)), "Linear"),
    "some channels": (lambda: Functional(lambda m, x: m.one(x)[:, :2], one=conv(2, 4)), "getitem"),
    "tokens": (
        lambda: Functional(lambda m, x: m.one(x).flatten(2).transpose(1, 2), one=conv(2, 4)),
        "flatten",
    ),
    "regrouped": (
        lambda: Functional(lambda m, x: m.one(x).view(x.size(0) * 4, -1), one=conv(2, 4)),
        "view",
    ),
    "tied": (lambda: Tied(), "tied"),
    "data-dependent": (
        lambda: Functional(lambda m, x: m.one(x) if x.sum() > 0 else x, one=conv(2, 2)),
        "cannot trace",
    ),
    "raw parameter": (lambda: RawParameter(), "scale"),
}


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_mix_units_is_refused_in_one_line(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        permutation_spec(make())
    assert "\n" not in str(caught.value)


def test_bad_parameters_are_refused() -> None:
    model = build("mlp", hidden=(3,))
    spec, good = permutation_spec(model), model.state_dict()
    broken = {**good, "1.bias": torch.full((3,), torch.nan)}
    missing = {n: t for n, t in good.items() if n != "1.bias"}
    for bad, message in ((broken, "not finite"), (missing, "missing")):
        with pytest.raises(InputError, match=message):
            weight_matching(spec, good, bad, generator())
    with pytest.raises(InputError, match="same architecture"):
        other = build("mlp", hidden=(4,)).state_dict()
        weight_matching(spec, good, other, generator())
    with pytest.raises(InputError, match="restarts=0"):
        weight_matching(spec, good, good, generator(), restarts=0)


# --- matching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("structure", ["simple_cnn", "mlp", "resnet20", "residual stream"])
def test_a_planted_permutation_is_recovered_exactly(structure: str, seed: int) -> None:
    model = randomised(STRUCTURES[structure](), seed)
    a, spec = model.state_dict(), permutation_spec(model)
    b = apply(spec, random_permutations(spec, generator(seed)), a)
    matched = weight_matching(spec, a, b, generator(seed))
    aligned = apply(spec, matched.permutations, b)
    assert all(torch.equal(aligned[name], a[name]) for name in a)
    assert matched.converged
    assert matched.similarity == pytest.approx(similarity(spec, a, a), rel=1e-12)


def test_planted_permutations_at_initialisation_where_norms_tell_nothing() -> None:
    model = models.build("resnet20", input_shape=(3, 32, 32), classes=10, seed=0)
    a, spec = model.state_dict(), permutation_spec(model)
    b = apply(spec, random_permutations(spec, generator()), a)
    aligned = apply(spec, weight_matching(spec, a, b, generator()).permutations, b)
    assert all(torch.equal(aligned[name], a[name]) for name in a)


@pytest.mark.parametrize("seed", range(6))
def test_matching_finds_the_best_of_all_permutations(seed: int) -> None:
    a, b = (
        randomised(models.build("mlp", input_shape=(5,), classes=3, seed=0, hidden=(4, 3)), s)
        for s in (seed, seed + 50)
    )
    spec, theta_a, theta_b = permutation_spec(a), a.state_dict(), b.state_dict()
    every = [similarity(spec, theta_a, apply(spec, p, theta_b)) for p in all_permutations(spec)]
    matched = weight_matching(spec, theta_a, theta_b, generator(), restarts=20)
    assert matched.similarity == pytest.approx(max(every), rel=1e-12)
    aligned = apply(spec, matched.permutations, theta_b)
    assert similarity(spec, theta_a, aligned) == pytest.approx(matched.similarity, rel=1e-12)


@pytest.mark.parametrize("structure", ["simple_cnn", "residual stream", "concatenation"])
def test_matching_never_moves_networks_apart(structure: str) -> None:
    a = randomised(STRUCTURES[structure](), 1)
    theta_a, spec = {n: t.clone() for n, t in a.state_dict().items()}, permutation_spec(a)
    theta_b = randomised(a, 2).state_dict()
    matched = weight_matching(spec, theta_a, theta_b, generator(), restarts=3)
    assert matched.similarity >= similarity(spec, theta_a, theta_b)
    # It is a local optimum: no transposition within one group improves it.
    for group, order in matched.permutations.items():
        for i, j in product(range(len(order)), repeat=2):
            swapped = order.clone()
            swapped[[i, j]] = order[[j, i]]
            other = apply(spec, {**matched.permutations, group: swapped}, theta_b)
            if structure != "residual stream":  # there the group is indexed twice by a weight
                assert similarity(spec, theta_a, other) <= matched.similarity + 1e-9


def test_inputs_and_global_random_state_are_untouched() -> None:
    model = build("simple_cnn", width=4)
    a = model.state_dict()
    before, state = {n: t.clone() for n, t in a.items()}, torch.get_rng_state()
    spec = permutation_spec(model)
    b = apply(spec, random_permutations(spec, generator()), a)
    one, two = (weight_matching(spec, a, b, generator(7)) for _ in range(2))
    assert all(torch.equal(a[n], before[n]) for n in a)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one.permutations[g], two.permutations[g]) for g in spec.sizes)
    assert one.similarity == two.similarity


# --- barriers -------------------------------------------------------------------------------------


def barrier(model: nn.Module, a: Tensors, b: Tensors, value: Callable[[Tensor], Tensor]) -> float:
    """Largest rise of `value(outputs)` on the straight line above the mean of its ends."""
    heights = [
        value(functional_call(model, {n: torch.lerp(a[n], b[n], t) for n in a})).item()
        for t in torch.linspace(0, 1, 21, dtype=torch.float64)
    ]
    return max(heights) - (heights[0] + heights[-1]) / 2


class Fixed(nn.Module):
    """A network on fixed inputs."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.network, self.x = network, x

    def forward(self) -> Tensor:
        return self.network(self.x)


def named(tensors: Tensors) -> dict[str, Tensor]:
    return {f"network.{n}": t for n, t in tensors.items()}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16 - 0.3)[:, None], torch.tensor(data.target)


def trained(name: str, seed: int, digits: tuple[Tensor, Tensor], **options: Any) -> nn.Module:
    (x, y), rng = digits, generator(seed)
    model = models.build(name, input_shape=(1, 8, 8), classes=10, seed=seed, **options).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        for batch in torch.randperm(len(x), generator=rng).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {"hidden": (32, 32)}), ("simple_cnn", {"width": 4})]
)
def test_a_permuted_copy_has_a_barrier_until_it_is_aligned(
    name: str, options: dict, digits: tuple[Tensor, Tensor]
) -> None:
    model, (x, y) = trained(name, 0, digits, **options), digits
    a, spec, fixed = model.state_dict(), permutation_spec(model), Fixed(model, x)
    b = apply(spec, random_permutations(spec, generator()), a)
    aligned = apply(spec, weight_matching(spec, a, b, generator()).permutations, b)

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    assert barrier(fixed, named(a), named(b), loss) > 0.5
    assert barrier(fixed, named(a), named(aligned), loss) < 1e-10


def test_aligning_independent_networks_lowers_the_barrier(digits: tuple[Tensor, Tensor]) -> None:
    one, two = (trained("mlp", seed, digits, hidden=(64, 64)) for seed in (0, 1))
    a, b, spec = one.state_dict(), two.state_dict(), permutation_spec(one)
    aligned = apply(spec, weight_matching(spec, a, b, generator()).permutations, b)
    x, y = digits

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    ends = [loss(functional_call(one, tensors, (x,))).item() for tensors in (a, b)]
    assert max(ends) < 0.1
    before = barrier(Fixed(one, x), named(a), named(b), loss)
    after = barrier(Fixed(one, x), named(a), named(aligned), loss)
    assert before > 0.3
    assert after < before / 2


def test_two_unit_networks_that_no_permutation_connects() -> None:
    """The counterexample of Ainsworth et al. 2023, §A.6: 1 if both inputs are positive, else 0."""
    x = torch.rand(2000, 2, generator=generator(), dtype=torch.float64) * 2 - 1
    y = (x >= 0).all(1)
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    first, second = [[1, 0], [0, -1]], [[-1, 0], [0, 1]]
    common = {"4.weight": [[-1, -1]], "4.bias": [0]}
    a = {"0.weight": first, "0.bias": [1, 0], "2.weight": second, "2.bias": [1, 0], **common}
    b = {"0.weight": second, "0.bias": [0, 1], "2.weight": first, "2.bias": [0, 1], **common}
    theta_a, theta_b = (
        {n: torch.tensor(v, dtype=torch.float64) for n, v in theta.items()} for theta in (a, b)
    )
    spec, fixed = permutation_spec(network), Fixed(network, x)

    def wrong(outputs: Tensor) -> Tensor:
        return ((outputs[:, 0] >= 0) != y).double().mean()

    for theta in (theta_a, theta_b):
        assert wrong(functional_call(network, theta, (x,))) == 0
    every = all_permutations(spec)
    assert len(every) == 4
    matched = weight_matching(spec, theta_a, theta_b, generator())
    for permutations in (*every, matched.permutations):
        moved = apply(spec, permutations, theta_b)
        assert barrier(fixed, named(theta_a), named(moved), wrong) > 0.2
    assert identity_permutations(spec).keys() == matched.permutations.keys()

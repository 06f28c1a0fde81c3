"""Blocks of a network against the blocks of dense matrices, and their errors against jackknives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from lsa.figures.layers import draw, stacked
from lsa.landscape import Landscape, flatten
from lsa.landscape.blocks import blocks
from lsa.maths.spectra import eigenpairs
from lsa.probe import Curve, Metric, Result, Sizes, find
from lsa.probes.layers import Search, layers
from lsa.runtime.errors import InputError
from lsa.training import models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
N = 160  # the errors are first-order: at 40 samples they are a quarter off the jackknife's
SIZES = {"0": 24, "2": 15, "4": 12}  # parameters of the three layers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure(landscape: Landscape, theta: Tensor, **options: Any) -> Result:
    given = {"k": 2, "tol": 1e-6} | options
    return layers(landscape, theta, generator(), lambda *_: None, **given)


@pytest.fixture(scope="module")
def net() -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)
        ).double()
    x = torch.randn(N, 5, generator=generator(1), dtype=torch.float64)
    y = torch.randint(0, 3, (N,), generator=generator(2))
    return Landscape(model, x, y, chunk=16), 2 * flatten(model)


@pytest.fixture(scope="module")
def hessians(net) -> Tensor:
    """∇²ℓᵢ of every sample, `(N, d, d)`."""
    landscape, theta = net

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(landscape.outputs(t, x[None]), y[None])

    return vmap(hessian(loss), (None, 0, 0))(theta, landscape.x, landscape.y)


def cut(values: Tensor) -> tuple[Tensor, ...]:
    """The part of every layer."""
    return values.split(list(SIZES.values()), dim=-1)


def diagonal(H: Tensor) -> list[Tensor]:
    """The diagonal blocks of a matrix."""
    return [cut(rows.T)[i].T for i, rows in enumerate(cut(H))]


def jackknife(f: Any, samples: Tensor) -> float:
    """Standard error of f(mean of the samples)."""
    left_out = (samples.sum(0) - samples) / (N - 1)
    return float(np.std([f(mean) for mean in left_out]) * (N - 1) ** 0.5)


def test_the_ends_are_those_of_the_dense_blocks(net, hessians):
    found = measure(*net)
    H = hessians.mean(0)
    spectra = [torch.linalg.eigvalsh(block) for block in diagonal(H)]
    top = [s[-1].item() for s in spectra]
    assert found.curves["lambda_max_of_block"].y == pytest.approx(top)
    lowest = [s[0].item() for s in spectra]
    assert found.curves["lambda_min_of_block"].y == pytest.approx(lowest, rel=1e-4, abs=1e-9)
    whole = torch.linalg.eigvalsh(H)[-1].item()
    assert found.metrics["lambda_max"].value == pytest.approx(whole)
    assert found.metrics["block_lambda_max"].value == pytest.approx(max(top))
    assert found.metrics["block_share"].value == pytest.approx(max(top) / whole)
    assert max(top) <= whole  # Cauchy's interlacing
    assert found.converged and found.notes == ("blocks from 1 on: 0, 2, 4",)
    assert list(found.arrays["blocks.names"]) == list(SIZES)
    assert list(found.arrays["blocks.sizes"]) == list(SIZES.values())
    assert len(draw(found, "title").axes) == 3


def test_traces_are_those_of_the_blocks_within_their_errors_and_add_up(net, hessians):
    H = hessians.mean(0)
    for k in (1, 4):
        found = measure(*net, k=k, probes=200, lower="no")
        curve, trace = found.curves["trace_of_block"], found.metrics["trace"]
        assert curve.error is not None
        for y, error, block in zip(curve.y, curve.error, diagonal(H), strict=True):
            assert y == pytest.approx(block.trace().item(), abs=4 * error)
        assert trace.value == pytest.approx(H.trace().item(), abs=4 * trace.errors["probes"])
        assert curve.y.sum() == pytest.approx(trace.value)


def test_the_error_of_a_trace_is_that_of_hutchinsons_estimator_without_the_known_pairs(
    net, hessians
):
    H = hessians.mean(0)
    values, vectors = torch.linalg.eigh(H)
    rest = H - vectors[:, -2:] * values[-2:] @ vectors[:, -2:].T
    spread = (2 * (rest.square().sum() - rest.diagonal().square().sum())).sqrt().item()
    found = measure(*net, k=2, probes=400, lower="no").metrics["trace"]
    assert found.errors["probes"] == pytest.approx(spread / 400**0.5, rel=0.2)


def test_with_every_eigenvector_known_the_traces_are_exact(net, hessians):
    landscape, theta = net
    found = measure(landscape, theta, k=len(theta), probes=2, lower="no")
    traces = [block.trace().item() for block in diagonal(hessians.mean(0))]
    assert found.curves["trace_of_block"].y == pytest.approx(traces, abs=1e-9)


def test_the_noise_of_a_block_is_its_part_of_the_dense_covariance(net):
    landscape, theta = net
    g = torch.cat(list(landscape.sample_gradients(theta)))
    C = (g - g.mean(0)).T @ (g - g.mean(0)) / N
    found = measure(landscape, theta, probes=2, lower="no")
    parts = [block.trace().item() for block in diagonal(C)]
    assert found.curves["noise_of_block"].y == pytest.approx(parts)
    assert found.metrics["trace_c"].value == pytest.approx(C.trace().item())
    share = found.curves["noise_share_of_block"]
    assert share.y == pytest.approx(np.array(parts) / sum(parts)) and share.error is not None
    squares = torch.stack([part.square().sum(1) for part in cut(g - g.mean(0))], dim=1)
    for i in range(3):
        error = jackknife(lambda mean, i=i: (mean[i] / mean.sum()).item(), squares)
        assert share.error[i] == pytest.approx(error, rel=0.1)


def test_errors_of_eigenvalues_are_those_of_the_jackknife(net, hessians):
    found = measure(*net)

    def top(H: Tensor) -> float:
        return torch.linalg.eigvalsh(H)[-1].item()

    def sharpest(H: Tensor) -> float:
        return max(top(block) for block in diagonal(H))

    expected = {
        "lambda_max": jackknife(top, hessians),
        "block_lambda_max": jackknife(sharpest, hessians),
        "block_share": jackknife(lambda H: sharpest(H) / top(H), hessians),
    }
    for name, error in expected.items():
        assert found.metrics[name].errors["data"] == pytest.approx(error, rel=0.15), name


def test_layers_are_grouped_by_the_first_parts_of_their_names():
    model = models.build("resnet20", input_shape=(3, 8, 8), classes=10, seed=0)
    names = [name for name, _ in model.named_parameters()]
    every, first = blocks(names, 0), blocks(names, 1)
    assert [name for members in every.values() for name in members] == names
    assert list(every)[2:4] == ["3.conv1", "3.norm1"] and every == blocks(names, 2)
    assert {"3.conv1.weight", "3.norm2.bias"} < set(first["3"])
    assert list(first) == list(dict.fromkeys(name.split(".")[0] for name in names))
    assert blocks(["w", "a.b.weight", "a.c.weight", "a.b.bias"], 0) == {
        "w": ["w"],
        "a.b": ["a.b.weight", "a.b.bias"],
        "a.c": ["a.c.weight"],
    }
    at = Sizes(10**6, 10, 10, 10, tuple(names))
    work = find("layers").work
    assert work is not None
    costs = [
        work(at, depth=depth, fused="apart", lower="no", tol=1e-2, k=8, probes=20).products
        for depth in (1, 0)
    ]
    assert costs[0] < costs[1]


def test_a_block_of_one_parameter_is_its_own_spectrum():
    class Scaled(nn.Module):
        """ℓᵢ = xᵢ (a² + a b + ½b²): H = mean x · (2, 1; 1, 1)."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.b = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.a**2 + self.a * self.b + self.b**2 / 2)

    model, x = Scaled(), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    landscape = Landscape(model, x, torch.zeros(2), lambda o, y: o.mean())
    found = measure(landscape, flatten(model), k=1)
    for name in ("lambda_max_of_block", "lambda_min_of_block"):
        assert found.curves[name].y == pytest.approx([3, 1.5])
    assert found.metrics["block_share"].value == pytest.approx(3 / (1.5 * (3 + 5**0.5) / 2))


def test_a_landscape_without_noise_or_curvature_has_no_shares():
    model = nn.utils.skip_init(nn.Linear, 3, 2, dtype=torch.float64)
    x = torch.ones(4, 3, dtype=torch.float64)
    landscape = Landscape(model, x, torch.zeros(4), lambda o, y: o.mean())
    found = measure(landscape, torch.ones(8, dtype=torch.float64), k=1, probes=2)
    assert np.isnan(found.metrics["block_share"].value) and found.metrics["trace"].value == 0
    assert found.metrics["trace_c"].value == 0 and "noise_share_of_block" not in found.curves
    assert len(draw(found, "title").axes) == 3


def test_what_has_not_converged_is_named(net):
    found = measure(*net, max_products=3)
    assert not found.converged
    assert [note.split(":")[0] for note in found.notes] == [
        "whole network",
        "0",
        "2",
        "4",
        "blocks from 1 on",
    ]


def test_more_eigenvectors_than_parameters_are_refused(net):
    with pytest.raises(InputError, match=r"k=52.*d=51"):
        measure(*net, k=52)


def test_blocks_of_a_rectifier_network_are_semidefinite_and_converge_all_the_same():
    """H of one layer's weights is XᵀGX with G ⪰ 0, so λ_min is 0: a note says which are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 12, generator=rng), torch.randint(6, (64,), generator=rng)
    found = layers(Landscape(model, x, y), flatten(model), rng, lambda *_: None, probes=2, k=2)
    lowest, highest = (found.curves[f"lambda_{end}_of_block"].y for end in ("min", "max"))
    assert found.converged
    assert (abs(lowest) < 1e-3 * highest).all()


def transformer_result(depth: int = 3) -> Result:
    """As the probe gives it of a transformer whose blocks have four kinds of layers."""
    kinds = ("norm", "qkv.query", "qkv.key", "out")
    names = ["tokens", *(f"blocks.{i}.{kind}" for i in range(depth) for kind in kinds), "norm"]
    index = np.arange(1.0, len(names) + 1)
    tops = 10.0 ** (index / 4)
    traces = np.where(index == 3, -1.0, tops)  # block 3 is blocks.0.qkv.query
    return Result(
        {
            "lambda_max": Metric(5000.0, "loss"),
            "block_share": Metric(0.5),
            "trace": Metric(float(traces.sum()), "loss", {"probes": 1.0}),
        },
        {
            "lambda_max_of_block": Curve(index, tops, "block"),
            "trace_of_block": Curve(index, traces, "block"),
        },
        {"blocks.names": np.array(names)},
    )


def test_repeated_blocks_are_drawn_by_depth_and_kind():
    result = transformer_result()
    figure = draw(result, "GPT")
    first, second, third = figure.axes
    assert [t.get_text() for t in first.get_xticklabels()] == [
        "norm",
        "qkv.query",
        "qkv.key",
        "out",
    ]
    assert [t.get_text() for t in first.get_yticklabels()] == ["0", "1", "2"]
    tops = result.curves["lambda_max_of_block"].y
    shown = first.images[0].get_array()
    assert shown.shape == (3, 4)
    np.testing.assert_allclose(shown, tops[1:13].reshape(3, 4))
    assert [t.get_text() for t in first.texts] == [f"{v:.2g}" for v in tops[1:13]]
    assert "tokens 1.8" in first.get_xlabel() and f"norm {tops[-1]:.2g}" in first.get_xlabel()
    assert np.ma.count_masked(np.ma.masked_invalid(second.images[0].get_array())) == 1
    assert "-1" in [t.get_text() for t in second.texts]  # told, though it has no colour
    assert not third.images  # a landscape without losses of samples has no noise
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["0", "2", "4"], None),
        (["features.0", "features.3", "head"], None),
        ([f"h.{i}.{k}" for i in (0, 1) for k in "abc"], [0, 1]),
        ([f"h.{i}.{k}" for i in (0, 1) for k in "ab"], None),
        ([f"h.0.{k}" for k in "abc"], None),
        (["h.0.a", "h.0.b", "h.1.a", "h.1.c"], [0, 1]),
    ],
)
def test_blocks_that_repeat_are_seen_by_their_names(names, depths):
    stack = stacked(names)
    assert (stack.depths if stack else None) == depths
    if stack:
        placed = stack.index[stack.index >= 0]
        assert sorted([*placed, *stack.others]) == list(range(len(names)))


def test_a_blocks_second_eigenvalue_is_not_taken_for_its_largest(monkeypatch) -> None:
    """Random starts whose search without confirmation ended on 0.0987."""
    outer = torch.tensor([0.1574, 0.0987, 0.0460, 0.0308, 0.0268, 0.0245, -0.0228])
    spectrum = torch.cat([outer.double(), torch.linspace(1, -1, 761).double() ** 3 / 50])

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(768, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (spectrum * outputs.square()).sum(1).mean() / 2

    landscape = Landscape(Scale(), torch.ones(4, 768).double(), torch.zeros(4), loss)
    theta = torch.ones(768, dtype=torch.float64)
    for seed in (597, 793, 995):
        start = torch.randn(768, generator=generator(seed), dtype=torch.float64)
        monkeypatch.setattr(eigenpairs, "start_vector", lambda *_, start=start: start)
        search = Search(generator(1), 0.05, 300, lambda *_: None)
        block = search.block(landscape, theta, "w", (1, 0))
        assert block.ends.converged and block.top == pytest.approx(0.1574, rel=0.01)
    found = measure(landscape, theta, tol=0.05, lower="no", probes=2)
    limits = found.arrays["blocks.lambda_max_limit"]
    assert (limits >= found.arrays["blocks.lambda_max"]).all() and np.isfinite(limits).all()


@pytest.mark.parametrize("name", ["layers", "lanczos", "symmetry_audit"])
def test_no_probe_leaves_out_the_search_for_missed_eigenvalues(name, net, monkeypatch):
    """Also not of a single pair, as of a block's upper end, of a half or of a rescaled network."""
    asked, search = [], eigenpairs.lanczos

    def recorded(*given: Any, **options: Any) -> Any:
        asked.append((found := search(*given, **options)).products)
        least = options.get("confirm", eigenpairs.CONFIRM)
        assert least >= eigenpairs.CONFIRM, options
        return found

    monkeypatch.setattr(eigenpairs, "lanczos", recorded)
    landscape, theta = net
    options = {"layers": {"lower": "no"}, "lanczos": {"density_probes": 0}}.get(name, {})
    find(name)(landscape=landscape, theta=theta, rng_seed=0, **options)
    assert len(asked) > 3

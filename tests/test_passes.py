from __future__ import annotations

import json

import pytest
import torch

from lsa import passes
from lsa.landscape import Landscape, flatten


@pytest.mark.parametrize(
    ("usual", "most", "seconds", "expected", "asked"),
    [
        (32, 512, lambda size: 1 / size, 512, [32, 64, 128, 256, 512]),
        (32, 100, lambda size: 1 / size, 64, [32, 64]),
        (32, 512, lambda size: float(size), 1, [32, 64, 16, 8, 4, 2, 1]),
        (32, 512, lambda size: abs(size - 128) + 1.0, 128, [32, 64, 128, 256]),
        (32, 512, lambda size: 1.0 - size * 1e-5, 32, [32, 64, 16]),  # too little to be a gain
        (32, 512, lambda size: torch.inf if size > 32 else 1.0, 32, [32, 64, 16]),
        (1, 1, lambda size: 1.0, 1, [1]),
    ],
)
def test_the_fastest_size_is_found_by_doubling_or_halving(usual, most, seconds, expected, asked):
    sizes: list[int] = []

    def timed(size: int) -> float:
        sizes.append(size)
        return seconds(size)

    assert passes.fastest(timed, usual, most) == expected
    assert sizes == asked


@pytest.fixture
def landscape(monkeypatch, tmp_path) -> Landscape:
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return Landscape(model.double(), torch.randn(40, 3).double(), torch.arange(40) % 2)


def clock(monkeypatch, per_sample: dict[int, float]) -> list[int]:
    """Seconds per sample as given instead of measured ones; the sizes asked for."""
    asked: list[int] = []

    def seconds(_: Landscape, choice: passes.Choice) -> float:
        asked.append(choice.chunk)
        return per_sample[choice.chunk]

    monkeypatch.setattr(passes, "_seconds", seconds)
    return asked


def test_it_is_measured_once_for_a_network_and_shape(landscape, monkeypatch, tmp_path):
    asked = clock(monkeypatch, {40: 1.0, 20: 0.5, 10: 0.2, 5: 0.3})
    found = passes.fitted(landscape)
    theta = flatten(landscape.model)
    assert found.chunk == 10 and asked == [40, 20, 10, 5]
    assert torch.allclose(
        found.hessian(theta)(theta), landscape.hessian(theta)(theta), rtol=1e-12, atol=1e-15
    )
    assert passes.fitted(landscape).chunk == 10 and len(asked) == 4  # kept
    (file,) = (tmp_path / "cache" / "passes").iterdir()
    assert json.loads(file.read_text())["parameters"] == [[4, 3], [4], [2, 4], [2]]
    passes.fitted(landscape.with_data(landscape.x[:20], landscape.y[:20]))
    assert len(asked) == 7  # another shape


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"chunk": 0}',
        '{"chunk": 40}',
        '{"chunk": "10"}',
        '{"chunk": 40, "layout": "b"}',
    ],
)
def test_what_was_kept_and_is_damaged_is_measured_anew(landscape, monkeypatch, tmp_path, text):
    asked = clock(monkeypatch, {40: 1.0, 20: 2.0})
    passes.fitted(landscape)
    (file,) = (tmp_path / "cache" / "passes").iterdir()
    file.write_text(text)
    assert passes.fitted(landscape).chunk == 40 and asked == [40, 20] * 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(
    landscape, monkeypatch, tmp_path, caplog
):
    clock(monkeypatch, {40: 1.0, 20: 2.0})
    (tmp_path / "cache").write_text("a file")
    assert passes.fitted(landscape).chunk == 40
    assert "set LSA_CACHE to a writable folder" in caplog.text


@pytest.mark.parametrize(
    ("contiguous", "fixed", "expected"),
    [(0.5, "", "contiguous"), (0.97, "", "channels_last"), (0.5, "channels_last", "channels_last")],
)
def test_images_lie_as_is_faster_at_that_size_unless_that_is_fixed(
    monkeypatch, tmp_path, contiguous, fixed, expected
):
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LSA_LAYOUT", fixed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    images = Landscape(model, torch.randn(8, 2, 4, 4), torch.arange(8) % 2)
    asked: list[passes.Choice] = []

    def seconds(_: Landscape, choice: passes.Choice) -> float:
        asked.append(choice)
        return (1 + abs(choice.chunk - 4)) * (contiguous if choice.layout == "contiguous" else 1.0)

    monkeypatch.setattr(passes, "_seconds", seconds)
    found = passes.fitted(images)
    assert (found.chunk, found.layout) == (4, expected)
    last = found.x.is_contiguous(memory_format=torch.channels_last)
    assert last == (expected == "channels_last") and found.x.is_contiguous() != last
    before = len(asked)
    assert passes.fitted(images).layout == expected and len(asked) == before  # kept
    monkeypatch.setenv("LSA_LAYOUT", "contiguous")
    assert passes.fitted(images.with_model(model)).chunk == 4 and len(asked) > before  # another


def test_what_is_timed_are_whole_passes_and_enough_samples(landscape, monkeypatch):
    sizes = []

    def hessian(self, theta):
        sizes.append((self.chunk, self.n_samples, self.graph_memory))
        return lambda v: v

    monkeypatch.setattr(Landscape, "hessian", hessian)
    many = landscape.with_data(landscape.x.repeat(10, 1), landscape.y.repeat(10))
    assert all(
        passes._seconds(many, passes.Choice(size, "contiguous")) > 0 for size in (1, 24, 100)
    )
    assert sizes == [(1, 64, 0), (24, 48, 0), (100, 100, 0)]


def test_a_size_that_a_gpu_cannot_hold_is_no_choice(landscape, monkeypatch):
    def hessian(self, theta):
        def product(v):
            raise torch.OutOfMemoryError

        return product

    monkeypatch.setattr(Landscape, "hessian", hessian)
    assert passes._seconds(landscape, passes.Choice(8, "contiguous")) == torch.inf

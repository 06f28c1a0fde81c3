"""How much memory may be taken, where others limit it."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import nn

from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
from lsa.runtime import variables
from lsa.runtime.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def box(tmp_path, monkeypatch):
    """A container of 3 GB of which 1 GB is used."""
    files = {"max": "3000000000\n", "current": "1000000000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = tuple(str(tmp_path / name) for name in files)
    absent = (str(tmp_path / "none"), str(tmp_path / "none"))
    monkeypatch.setattr(budget, "LIMITS", (absent, paths))
    return tmp_path


def test_a_container_has_no_more_than_its_limit(box, monkeypatch):
    assert budget.free_memory() == 2_000_000_000
    (box / "max").write_text("max\n")  # no limit
    assert abs(budget.free_memory() - psutil.virtual_memory().available) < 1 << 30
    (box / "max").write_text("500\n")  # lowered below what is in use
    assert budget.free_memory() == 0


def test_a_process_takes_that_part_of_the_memory_that_it_has_of_the_cores(box, monkeypatch):
    monkeypatch.setattr(budget, "_cores", lambda: 8)
    for threads, part in ((8, 0.5), (2, 0.125), (16, 0.5)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert budget.graph_memory(CPU) == part * 2_000_000_000


def test_a_pass_holds_fewer_of_larger_images():
    small, large = torch.empty(1, 3, 8, 8), torch.empty(1, 3, 64, 64)
    convolution, linear = torch.nn.Conv2d(3, 1, 3), torch.nn.Linear(7, 1)
    assert budget.cache_size(convolution, small) == 512
    assert budget.cache_size(convolution, large) == 16
    assert budget.cache_size(torch.nn.Conv1d(7, 1, 3), torch.empty(5, 7, 9)) == 64
    assert budget.cache_size(linear, large) == budget.cache_size(linear, torch.empty(5, 7)) == 512


@pytest.fixture
def fresh(monkeypatch):
    """No setting of the process or of the environment."""
    monkeypatch.setattr(budget, "_configured", budget.Settings())
    monkeypatch.setattr(budget, "_environment", budget.Settings())
    for name in (variables.CHUNK, variables.GRAPH_MEMORY, variables.LAYOUT, variables.CONSISTENCY):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_what_the_environment_fixes_must_be_a_whole_number(fresh):
    budget.from_environment()
    assert budget.settings() == budget.Settings()
    for text, value in (("32", 32), ("2e9", 2_000_000_000), ("", None)):
        fresh.setenv(variables.CHUNK, text)
        budget.from_environment()
        assert budget.settings().chunk == value
    for text in ("0", "-1", "1.5", "many", "nan", "inf"):
        fresh.setenv(variables.CHUNK, text)
        with pytest.raises(InputError, match=rf"LSA_CHUNK='{text}' is no .* ≥ 1;"):
            budget.from_environment()
    fresh.setenv(variables.CHUNK, "1")
    fresh.setenv(variables.GRAPH_MEMORY, "0")
    budget.from_environment()
    assert budget.settings().memory == 0
    for text in ("-1", "rules"):
        fresh.setenv(variables.GRAPH_MEMORY, text)
        with pytest.raises(InputError, match=rf"LSA_GRAPH_MEMORY='{text}' is no .* ≥ 0;"):
            budget.from_environment()


def test_what_python_configures_comes_before_the_environment(fresh):
    fresh.setenv(variables.CHUNK, "5")
    fresh.setenv(variables.LAYOUT, "contiguous")
    budget.from_environment()
    budget.configure(chunk=7, memory=9)
    assert budget.settings() == budget.Settings(7, 9, "contiguous", True)
    budget.configure(chunk=None)
    assert budget.settings().chunk == 5
    for bad in ({"chunk": 0}, {"memory": -1}, {"layout": "rows"}, {"threads": 3}):
        with pytest.raises(InputError, match=next(iter(bad))):
            budget.configure(**bad)


def test_a_basis_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    theta = torch.zeros(1000)
    monkeypatch.setattr(budget, "free_memory", lambda: 64_000)
    assert budget.basis(theta, 2) == 8
    with pytest.raises(InputError, match=r"need a basis of 9 vectors.*take fewer, parameters"):
        budget.basis(theta, 5)
    monkeypatch.setattr(budget, "free_memory", lambda: 1 << 40)
    assert budget.basis(theta, 5) == 100


@pytest.mark.parametrize(
    ("first", "layout"),
    [
        (nn.Conv2d(3, 8, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(3, 8, (1, 1), stride=(1, 2)), torch.contiguous_format),
        (nn.Conv2d(3, 8, 1), torch.channels_last),
        (nn.Conv2d(3, 8, 3, stride=2), torch.channels_last),
        (nn.Conv2d(3, 3, 1, stride=2, groups=3), torch.channels_last),
        (nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1, stride=2)), torch.channels_last),
    ],
)
def test_images_stay_contiguous_where_a_gradient_corrupts_memory_otherwise(first, layout):
    model = nn.Sequential(first, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 3, 6, 6)
    model(x)
    assert budget.image_layout(model, x) == layout
    assert budget.image_layout(model, x, "channels_last") == torch.channels_last
    assert Landscape(model, x, torch.arange(4) % 2).x.is_contiguous(memory_format=layout)

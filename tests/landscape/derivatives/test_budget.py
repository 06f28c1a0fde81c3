"""How much memory may be taken, where others limit it."""

from __future__ import annotations

import psutil
import pytest
import torch

from lsa.landscape.derivatives import budget
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


def test_what_is_fixed_must_be_a_whole_number(monkeypatch):
    monkeypatch.delenv(budget.CHUNK, raising=False)
    assert budget.fixed_chunk() is None
    for text, value in (("32", 32), ("2e9", 2_000_000_000), ("", None), ("rules", None)):
        monkeypatch.setenv(budget.CHUNK, text)
        assert budget.fixed_chunk() == value and budget.by_rules() == (text == "rules")
    for text in ("0", "-1", "1.5", "many", "nan", "inf"):
        monkeypatch.setenv(budget.CHUNK, text)
        with pytest.raises(InputError, match=rf"LSA_CHUNK='{text}' is no .* ≥ 1, nor 'rules';"):
            budget.check_environment()
    monkeypatch.setenv(budget.CHUNK, "1")
    monkeypatch.setenv(budget.MEMORY, "0")
    assert budget.fixed_memory() == 0
    for text in ("-1", "rules"):
        monkeypatch.setenv(budget.MEMORY, text)
        with pytest.raises(InputError, match=rf"LSA_GRAPH_MEMORY='{text}' is no .* ≥ 0;"):
            budget.check_environment()


def test_fewer_threads_compute_with_the_memory_of_all(monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda: 1000)
    monkeypatch.setattr(budget, "_cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with budget.computing(1):
            assert torch.get_num_threads() == 1
            with budget.computing(2):
                assert torch.get_num_threads() == 2
                assert budget.graph_memory(torch.device("cpu")) == 500
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
        torch.set_num_threads(1)  # a worker that was given one
        assert budget.graph_memory(torch.device("cpu")) == 125
    finally:
        torch.set_num_threads(before)

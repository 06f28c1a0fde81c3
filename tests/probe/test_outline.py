"""Declarations read from text: what they say, and when the module is imported after all."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from lsa.probe import PROBES, outline, registry
from lsa.runtime.errors import InputError


def test_summaries_are_the_docstrings_first_lines():
    for name, summary in outline.summaries().items():
        assert summary == registry.find(name).summary


def test_an_entry_point_left_behind_does_not_hide_the_other_probes(monkeypatch):
    point = EntryPoint("gone", "uninstalled_package.gone", "lsa.probes")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,))
    found = outline.summaries()
    assert found["gone"] == "" and found["lanczos"]


def test_summaries_load_no_torch():
    code = "import sys; from lsa.probe import outline; outline.summaries(); "
    code += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", [n for n, m in registry.modules().items() if "lsa." in m])
def test_an_outline_says_what_the_declaration_says(name, monkeypatch):
    found = registry.find(name)
    monkeypatch.delitem(PROBES, name)
    outlined = outline.read(name)
    assert name not in PROBES, "nothing was imported"
    for part in ("name", "inputs", "options", "headline", "doc"):
        assert getattr(outlined, part) == getattr(found, part)
    with pytest.raises(TypeError, match="only outlined"):
        outlined.function()


def test_what_the_text_does_not_tell_is_imported(tmp_path, monkeypatch):
    text = """
from typing import Annotated
from lsa.probe import Result, probe

SIZE = 3

@probe()
def constant(theta, *, size: Annotated[int, "a size"] = SIZE) -> Result:
    "A default that is no literal."
"""
    (tmp_path / "constant_probe.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("constant", "constant_probe", "lsa.probes")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,))
    assert outline.read("constant").options["size"].default == 3
    with pytest.raises(InputError, match="unknown probe 'constat'"):
        outline.read("constat")

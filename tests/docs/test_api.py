"""Every public name has an entry in the API reference and a docstring."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from pages import DOCS

import lsa
from lsa.probe import Probe

TEXT = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
ENTRIES = set(re.findall(r"^\.\. (?:auto|py:)\w+:: (lsa\.[\w.]+)", TEXT, re.MULTILINE))
MODULES = ("lsa", "lsa.landscape", "lsa.objectives", "lsa.probe", "lsa.watching")


def public(module: str) -> list[str]:
    """What `dir` lists of lsa and its watching, and the names in `__all__` of the others."""
    found = lsa.objectives if module == "lsa.objectives" else importlib.import_module(module)
    return [*getattr(found, "__all__", ()), *(dir(found) if "__dir__" in vars(found) else ())]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_entry(module):
    names = public(module)
    # A name that lsa itself has too is described there.
    written = {e.rsplit(".", 1)[1] for e in ENTRIES if e.rsplit(".", 1)[0] in ("lsa", module)}
    assert names and set(names) <= written


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_an_entry_is_of_something_that_says_what_it_is(entry):
    if f".. py:data:: {entry}" in TEXT:
        return  # a value: its text is in the page
    home, name = entry.rsplit(".", 1)
    try:
        found = importlib.import_module(entry)
    except ModuleNotFoundError:
        holder = lsa.objectives if home == "lsa.objectives" else importlib.import_module(home)
        if name.endswith("Callback"):
            pytest.importorskip("lightning" if "Lightning" in name else "transformers")
        found = getattr(holder, name)
    text = inspect.getdoc(found)
    assert text and (isinstance(found, Probe) or text != inspect.getdoc(type(found)))

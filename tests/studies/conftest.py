"""A module of somebody else's, as the tests of adoption need it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from theirs import NAME, PARTS


@pytest.fixture
def parts(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, importable here and in processes that start here."""
    (workplace / f"{NAME}.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(workplace))
    yield __import__(NAME)
    sys.modules.pop(NAME, None)

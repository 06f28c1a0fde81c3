"""A store that a test of this room unplugs."""

from __future__ import annotations

from pathlib import Path

import pytest
from plug import Plug


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> Plug:
    return Plug(monkeypatch)

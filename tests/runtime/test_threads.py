"""Threads of OpenMP that wait sleep soon, unless the user has chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lsa.runtime import threads

NAMES = (threads.LOOKS, *threads.OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_who_has_chosen_is_left_alone(name: str):
    environment = {name: "7"}
    threads.sleep_soon(environment)
    assert environment == {name: "7"}


def test_the_command_sets_it_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch):
    """OpenMP reads its variables once, when torch loads it; it shows them where it is asked to."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    code = "import sys; sys.argv[1:] = ['--version']; from lsa.__main__ import main; main()"
    code = f"import atexit; atexit.register(lambda: __import__('torch')); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch is built with another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr

"""Threads of OpenMP that wait sleep, unless the user has chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lsa.runtime import threads


@pytest.mark.parametrize("name", threads.SET)
def test_who_has_chosen_is_left_alone(name: str):
    environment = {name: "ACTIVE"}
    threads.sleep_while_waiting(environment)
    assert environment == {name: "ACTIVE"}


def test_the_command_sets_it_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch):
    """OpenMP reads its variables once, when torch loads it; it shows them where it is asked to."""
    for name in threads.SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    code = "import sys; sys.argv[1:] = ['--version']; from lsa.__main__ import main; main()"
    code = f"import atexit; atexit.register(lambda: __import__('torch')); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("torch is built without OpenMP that tells of itself")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr

"""What a process keeps of what it frees: faults and resident memory, each case in its own."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from lsa import __main__
from lsa.runtime import heap, variables

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)

BLOCK = 100 << 20  # bytes; more than glibc keeps by itself
PAGES = BLOCK // os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 0
BEGIN = f"""
import json, resource
from lsa.runtime import heap
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    block = bytearray({BLOCK})  # the C library's, filled with zeros
    block[::4096] = b"1" * len(range(0, {BLOCK}, 4096))
def faults(rounds=5):
    use()
    before = pages()
    for _ in range(rounds):
        use()
    return (pages() - before) / rounds
"""


def run(body: str, **environment: str) -> Any:
    """What a fresh process prints, as JSON."""
    chosen = {variables.KEEP_FREED, *heap.TUNED}
    usual = {k: v for k, v in os.environ.items() if k not in chosen}
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}\n{body}"],
        env=usual | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_what_is_freed_is_taken_again_without_a_fault():
    usual, kept = run(
        """
usual = faults()
heap.keep()
print(json.dumps([usual, faults()]))
"""
    )
    assert usual > 0.9 * PAGES
    assert kept < 0.01 * PAGES


def test_the_command_keeps_from_its_start(monkeypatch):
    kept = []
    monkeypatch.setattr(heap, "keep", lambda: kept.append(True))
    monkeypatch.setattr(gc, "set_threshold", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["lsa", "--version"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit):
        __main__.main()
    assert kept == [True]


@pytest.mark.parametrize(
    "environment",
    [
        {"LSA_KEEP_FREED": "off"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_who_has_chosen_is_left_alone(environment):
    found = run("heap.keep()\nprint(json.dumps(faults()))", **environment)
    assert found > 0.9 * PAGES


def test_an_older_version_keeps_what_it_can(monkeypatch):
    """It refuses more than 32 MB, and adjusts nothing more once a threshold is set."""
    now = {}

    class Older:
        def mallopt(self, parameter: int, value: int) -> int:
            if parameter == heap.MMAP_THRESHOLD and value > 32 << 20:
                return 0
            now[parameter] = value
            return 1

    monkeypatch.setattr(heap, "_glibc", Older)
    monkeypatch.setattr(heap, "_keeps", False)
    heap.keep()
    assert now == {heap.TRIM_THRESHOLD: (1 << 31) - 1, heap.MMAP_THRESHOLD: 32 << 20}
    heap.give_back()  # which it does by itself


def test_more_than_a_limit_is_given_back_before_memory_is_counted():
    resident = """
import psutil
from lsa.landscape.derivatives import budget
resident = lambda: psutil.Process().memory_info().rss
heap.keep()
use()
kept = resident()
budget.free_memory()
below = resident()
heap.KEPT = 1 << 20
budget.free_memory()
print(json.dumps([kept - below, kept - resident()]))
"""
    below, above = run(resident)
    assert abs(below) < 0.1 * BLOCK and above > 0.9 * BLOCK


def test_who_does_not_keep_gives_nothing_back(monkeypatch):
    monkeypatch.setattr(heap, "_keeps", False)
    monkeypatch.setattr(heap, "KEPT", 0)
    monkeypatch.setattr(heap, "_glibc", lambda: pytest.fail("asked the C library"))
    heap.give_back()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv(variables.KEEP_FREED, raising=False)
    for name in heap.TUNED:
        monkeypatch.delenv(name, raising=False)
    assert heap._glibc() is not None
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())  # musl has no such function
    assert heap._glibc() is None
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap._glibc() is None
    heap.keep()

"""What a process keeps of what it frees: faults and resident memory, each case in its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from lsa.runtime import heap

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)

BLOCK = 100 << 20  # bytes; more than glibc keeps by itself
PAGES = BLOCK // os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 0
BEGIN = f"""
import contextlib, json, resource
from lsa.runtime import heap
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
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
    variables = {k: v for k, v in os.environ.items() if k not in {heap.SWITCH, *heap.TUNED}}
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}\n{body}"],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_what_is_freed_is_taken_again_without_a_fault():
    found = run(
        """
usual = faults()
with heap.kept():
    kept = faults()
print(json.dumps([usual, kept, faults()]))
"""
    )
    usual, kept, after = found
    assert usual > 0.9 * PAGES and after > 0.9 * PAGES
    assert kept < 0.01 * PAGES


def test_afterwards_all_that_is_free_goes_back():
    before, within, after = run(
        """
before = resident()
with heap.kept():
    use()
    within = resident()
print(json.dumps([before, within, resident()]))
"""
    )
    assert within - before > 0.9 * PAGES
    assert after - before < 0.1 * PAGES


def test_within_each_other_the_outermost_decides():
    found = run(
        """
with heap.kept():
    with contextlib.suppress(ValueError), heap.kept():
        raise ValueError
    print(json.dumps(faults()))
"""
    )
    assert found < 0.01 * PAGES


@pytest.mark.parametrize(
    "environment",
    [
        {"LSA_KEEP_FREED": "off"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_who_has_chosen_is_left_alone(environment):
    found = run("with heap.kept():\n    print(json.dumps(faults()))", **environment)
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

        def malloc_trim(self, _: int) -> None:
            pass

    monkeypatch.setattr(heap, "_glibc", Older)
    with heap.kept():
        assert now == {heap.TRIM_THRESHOLD: (1 << 31) - 1, heap.MMAP_THRESHOLD: 32 << 20}
    assert now == heap.USUAL


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv(heap.SWITCH, raising=False)
    for name in heap.TUNED:
        monkeypatch.delenv(name, raising=False)
    assert heap._glibc() is not None
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())  # musl has no such function
    assert heap._glibc() is None
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap._glibc() is None
    with heap.kept():
        pass

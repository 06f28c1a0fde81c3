"""Claims between real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from processes import forked, started

from lsa.runtime import locks, provenance

HOLD = """
import sys, time
from lsa.runtime import locks
with locks.claim(sys.argv[1], "step"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(store: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds a lock, with temporary files of its own, as batch jobs have."""
    command, env = [sys.executable, "-c", HOLD, store], os.environ | {"TMPDIR": str(folder)}
    with started(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process


def test_a_claim_waits_for_its_holder_and_survives_its_death(tmp_path):
    store = str(tmp_path)
    with holder(store, tmp_path) as process:
        with locks.claim(store, "another step"), locks.claim(store + "2", "step"):
            pass  # neither is what the other process holds
        began = time.monotonic()
        killer = threading.Timer(1.0, process.kill)
        killer.start()
        with locks.claim(store, "step"):
            assert time.monotonic() - began > 0.9
        killer.join()


def test_locks_are_kept_where_no_home_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert locks._folder().is_dir() and tmp_path not in locks._folder().parents
    with locks.claim("store", "step"):
        pass


def test_a_process_is_known_to_be_gone(tmp_path):
    assert not provenance.gone(provenance.machine("cpu"))
    code = "from lsa.runtime import provenance; print(provenance.machine('cpu')['lsa.process'])"
    done = forked(code=code)
    here = provenance.machine("cpu")
    assert provenance.gone(here | {"lsa.process": done.stdout.strip()})
    pid = here["lsa.process"].partition("@")[0]
    assert provenance.gone(here | {"lsa.process": f"{pid}@1.00"})  # its number, used again
    assert not provenance.gone(here | {"lsa.host": "elsewhere", "lsa.process": "1@1.00"})
    assert not provenance.gone({})


def test_a_process_is_the_same_after_the_clock_was_set(monkeypatch):
    """The system tells when it was started by the clock of now; so does psutil of a process."""
    before = provenance.machine("cpu")
    later = psutil.boot_time() + 3600.5

    def boot_time() -> float:
        monkeypatch.setattr(psutil._psplatform, "BOOT_TIME", later, raising=False)  # older psutil
        return later

    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", boot_time)
    psutil.boot_time()
    assert psutil.Process().create_time() > time.time()
    assert not provenance.gone(before)

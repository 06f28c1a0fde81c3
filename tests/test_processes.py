"""What tests fork behaves as a process that was started."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from processes import command, forked


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("pass", 0),
        ("raise SystemExit(75)", 75),
        ("raise ValueError('told')", 1),
        ("import os; os._exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_its_exit_code_is_its_own(code, exit_code):
    done = forked(code=code)
    assert done.returncode == exit_code
    assert done.stderr.endswith("ValueError: told\n") == (exit_code == 1)


def test_it_has_its_environment_folder_arguments_and_output(tmp_path, monkeypatch):
    code = """
import atexit, os, sys
atexit.register(print, "at exit")
print(sys.argv[1:], os.getcwd(), os.getenv("LSA_TOLD"), os.getenv("LSA_HIDDEN"), flush=True)
os.system("echo child")
"""
    monkeypatch.setenv("LSA_HIDDEN", "of this process")
    done = forked("a", "b", code=code, cwd=tmp_path, env={"LSA_TOLD": "x", "PATH": "/bin"})
    assert done.stdout.splitlines() == [f"['a', 'b'] {tmp_path} x None", "child", "at exit"]


def test_none_of_it_is_left(tmp_path):
    code = """
import subprocess, time
print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
time.sleep(100)
"""
    output = tmp_path / "output"
    with command(code=code, stdout=output) as process:
        while not (output.exists() and output.read_text().endswith("\n")):
            time.sleep(0.05)
        child = psutil.Process(int(output.read_text()))
        assert os.getsid(process.pid) == process.pid == os.getsid(child.pid)
    assert process.exitcode == -signal.SIGKILL
    assert not psutil.wait_procs([child], timeout=10)[1]

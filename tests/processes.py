"""Real processes that no failing test leaves behind, and commands of lsa that start at once."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

# What a command needs besides `lsa`; imported once, in the process from which commands are forked.
PRELOADED = ["lsa.__main__", "lsa.studies", "sklearn.datasets", "mlflow.server"]


@contextlib.contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own; what is left of it and its children ends with the block.

    `subprocess.Popen` as a context waits instead: for ever, when a test fails on a process that
    never ends.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            _kill(process.pid)


def forks() -> BaseContext:
    """Processes forked from one that has imported torch and MLflow, and has nothing of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextlib.contextmanager
def command(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path
) -> Iterator[BaseProcess]:
    """A command of lsa as a process of `forks`, in a session of its own as by `started`.

    Exit code, signals, output and environment are a process's own. It saves the start, which takes
    longer than most commands do.
    """
    process = forks().Process(target=_run, args=(arguments, cwd, dict(env), stdout, stderr))
    process.start()
    try:
        yield process
    finally:
        _kill(process.pid)
        process.kill()  # also where it has no session of its own yet
        process.join()


def forked(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a `command` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        with command(arguments, cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1]) as process:
            process.join(timeout)
            code = process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(arguments, timeout)
        texts = [output.read_text() if output.exists() else "" for output in outputs]
    return subprocess.CompletedProcess(arguments, code, *texts)


def _run(
    arguments: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path
) -> None:
    """Become the command."""
    os.setsid()
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["lsa", *arguments]

    from lsa.__main__ import main

    try:
        main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out


def _kill(pid: int | None) -> None:
    """End a process's session and its children."""
    assert pid is not None
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()

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

LSA = "from lsa.__main__ import main; main()"
# Imported once, in the process from which commands are forked.
PRELOADED = [
    "lsa.__main__",
    "lsa.studies.study",
    "lsa.reports.report",
    "lsa.probes.lanczos",
    "sklearn.datasets",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
]


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
    *arguments: str, code: str = LSA, env: Mapping[str, str] | None = None, **files: Path
) -> Iterator[BaseProcess]:
    """A command of lsa, or other code, as a process of `forks`, in a session as by `started`.

    Exit code, signals, output and environment are a process's own. It saves the start, which takes
    longer than most commands do.

    Args:
        arguments: Of the command.
        code: What runs, with `arguments` in `sys.argv`.
        env: The environment; this process's own by default.
        files: `cwd`, where it runs; `stdout` and `stderr`, to which it appends what it prints.
    """
    environment = dict(os.environ if env is None else env)
    files = {"cwd": Path.cwd()} | files
    process = forks().Process(target=_run, args=(arguments, code, environment), kwargs=files)
    process.start()
    try:
        yield process
    finally:
        _kill(process.pid)
        process.kill()  # also where it has no session of its own yet
        process.join()


def forked(
    *arguments: str, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a `command` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        with command(*arguments, **files, **options) as process:
            process.join(timeout)
            code = process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(arguments, timeout)
        printed = [file.read_text() if file.exists() else "" for file in files.values()]
    return subprocess.CompletedProcess(arguments, code, *printed)


def _run(
    arguments: Sequence[str],
    code: str,
    env: Mapping[str, str],
    cwd: Path,
    stdout: Path | None = None,
    stderr: Path | None = None,
) -> None:
    """Become the command."""
    os.setsid()
    for file, number in ((stdout, 1), (stderr, 2)):
        if file:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["lsa", *arguments]
    try:
        exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})
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

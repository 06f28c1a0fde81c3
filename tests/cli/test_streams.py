"""Every command ends with its own code under whatever streams it is given."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lsa.cli import app, streams
from lsa.reports import records
from lsa.runtime.errors import Diverged
from lsa.tracking import store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
SHORT = ["--k", "1", "--density_probes", "0", "--split", "no"]


def redirected(monkeypatch, encoding: str) -> tuple[io.BytesIO, io.BytesIO]:
    """Standard output and error in an encoding; what is written into them."""
    written = io.BytesIO(), io.BytesIO()
    for name, raw in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding))
    streams.prepare()
    return written


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_no_encoding_breaks_a_command(trained, monkeypatch, encoding):
    out, error = redirected(monkeypatch, encoding)
    subject = ["--project", "tiny", "--optimizer", "sgd"]
    for command in (
        ["--help"],
        ["lanczos", "--help"],
        ["probes"],
        ["probes", "--json"],
        ["checkpoints"],
        ["checkpoints", "--json"],
        ["lanczos", *subject, *SHORT],
        ["show", *subject],
        ["study", "tiny", "--dry-run"],
    ):
        assert app.run(command) == 0, command
    assert app.run(["compare", "\u03bb"]) == 2
    sys.stdout.flush()
    assert b"lanczos/lambda_max" in out.getvalue()
    assert ("\u03bb" in error.getvalue().decode(encoding)) == (encoding == "utf-8")


def test_closed_streams_are_opened_onto_nothing(monkeypatch):
    for name, _ in streams.STREAMS:
        monkeypatch.setattr(sys, name, None)
    streams.prepare()
    assert not sys.stdout.isatty() and sys.stderr.writable() and sys.stdin.readable()


def test_where_nobody_reads_the_command_ends_as_by_sigpipe(monkeypatch):
    for command in (["probes"], ["--help"], ["probes", "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", encoding="utf-8"))
        assert app.run(command) == app.EXIT_PIPE == 141
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()


@pytest.mark.slow
def test_a_real_shell_may_close_streams_or_read_one_line(tmp_path):
    lsa = f"{sys.executable} -m lsa"
    for line, code in (
        (f"{lsa} probes | true; exit ${{PIPESTATUS[0]}}", 141),
        (f"{lsa} nope 2>&-", 2),
        (f"{lsa} probes >&- 2>&- <&-", 0),
        (f"{lsa} probes > /dev/full", 1),
    ):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code and "Traceback" not in done.stderr, (line, done)


def unallocatable() -> None:
    torch.empty(2**60)


FAILURES = {
    "torch is out of memory": (unallocatable, 1, "not enough memory"),
    "numpy is out of memory": (lambda: np.empty(2**50), 1, "not enough memory"),
    "too deep": (lambda: too_deep(), 1, "deeper than Python's stack"),
    "a long name": (lambda: open("x" * 5000), 1, "the name is too long"),
    "a training that diverged": (lambda: raised(Diverged("diverged in epoch 1")), 2, "diverged"),
}


def too_deep() -> None:
    too_deep()


def raised(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("fail", "code", "said"), FAILURES.values(), ids=FAILURES)
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, fail, code, said):
    monkeypatch.setattr(records, "checkpoints", lambda _: fail())
    assert app.run(["checkpoints"]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("float division by zero"), KeyError("model")])
def test_an_unforeseen_error_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(records, "checkpoints", lambda _: raised(error))
    with pytest.raises(type(error)):
        app.run(["checkpoints"])


@pytest.mark.parametrize("address", ["file:///tmp/x/mlruns", "mlruns", "nonsense://x", "ftp://x"])
def test_a_store_that_cannot_be_used_is_one_line(workplace, monkeypatch, capsys, address):
    import mlflow

    before = store.addresses()
    mlflow.set_tracking_uri(address)
    assert app.run(["checkpoints"]) == 2
    store.use(*before)
    error = capsys.readouterr().err
    assert "set MLFLOW_TRACKING_URI to" in error and error.count("\n") == 1


def test_the_version_is_told(capsys):
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lsa ")

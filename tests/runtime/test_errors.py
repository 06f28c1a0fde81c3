"""One plain line, whatever stands in it."""

from __future__ import annotations

import errno
import pickle
import sqlite3
import subprocess
import sys

import pytest

from lsa.runtime import failures
from lsa.runtime.errors import LONGEST, SHORT, InputError, brief, without_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se@cr:et@host/db", "postgresql://me:***@host/db"),
        ("at http://me:secret@h:5000/api failed", "at http://me:***@h:5000/api failed"),
        ("https://secret@host/x", "https://***@host/x"),
        (
            "postgresql://host/db?user=me&password=secret",
            "postgresql://host/db?user=me&password=***",
        ),
        ("a http://u:secret@b and c://v:secret@d", "a http://u:***@b and c://v:***@d"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("models:/tiny.sgd@best", "models:/tiny.sgd@best"),
        ("a: b@c", "a: b@c"),
    ],
)
def test_passwords_and_tokens_are_left_out_and_nothing_else(text, shown):
    assert without_passwords(text) == shown
    assert str(InputError(text)) == shown


def test_a_message_is_one_printable_line_of_bounded_length():
    message = str(InputError("a\nb\x1b[2J\x07 \u202e" + "x" * 10**6 + " and what to do"))
    assert message.isprintable() and message.startswith("a b\\x1b[2J\\x07 \\u202e")
    assert len(message) < LONGEST + 10 and message.endswith("and what to do")


def test_of_the_message_of_another_library_the_first_line_is_shown():
    assert brief(RuntimeError("\nwhat\nadvice\n  a stack")) == "what"
    assert brief(KeyError()) == "KeyError"
    long = brief(ValueError("a " * 10**4))
    assert long.startswith("a a") and long.endswith(" …") and len(long) == SHORT
    own = InputError("a value " * 40)
    assert brief(own) == str(own)


def test_an_error_travels_between_processes():
    found = pickle.loads(pickle.dumps(InputError("a  b")))
    assert type(found) is InputError and str(found) == "a b"


def test_what_the_machine_refuses_is_one_line():
    assert "mine: the disk is full" in str(failures.explained(OSError(errno.ENOSPC, "x", "mine")))
    try:
        try:
            raise sqlite3.OperationalError("database or disk is full")
        except sqlite3.OperationalError as error:
            raise RuntimeError("(sqlite3.OperationalError) …\nand its background") from error
    except RuntimeError as error:
        assert failures.explained(error) == (
            "the store's database: the disk is full; free some space, then start again"
        )
    assert "full" in str(failures.explained(OSError("1200 requested and 30 written")))  # NumPy's
    assert failures.explained(OSError(errno.ENOENT, "x")) is None
    assert failures.explained(ValueError("x")) is None


def test_a_traceback_holds_no_password():
    code = (
        "import lsa.cli.app, lsa.__main__ as main\n"
        "def run(arguments): raise RuntimeError('at http://me:secret@host/x')\n"
        "lsa.cli.app.run = run\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "me:***@host" in done.stderr and "secret@host/x')" not in done.stderr.splitlines()[-1]

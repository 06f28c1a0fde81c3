"""The one exception that means "the input is at fault", shown to people as a single plain line."""

from __future__ import annotations

import re

LONGEST = 1000  # characters of a message
SHORT = 200  # of one in passing


class InputError(ValueError):
    """Bad input. The message is one line: the value, the rule it breaks, and what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message))


class NotFinite(InputError):
    """A loss, gradient or product that is not finite, of a checkpoint or of single samples."""


class Diverged(ArithmeticError):
    """Training left the finite numbers; the message says when and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An error's whole message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def brief(error: BaseException) -> str:
    """An error in one short line: lsa's own message is one, of others the first line's beginning.

    Those of torch go on with advice and with stacks of Python.
    """
    if isinstance(error, InputError):
        return str(error)
    line = plain(first_line(error))
    return line if len(line) <= SHORT else f"{line[: SHORT - 2]} …"


def plain(text: str) -> str:
    """Text as one line of printable characters, without passwords and of bounded length.

    Messages hold values from project files and from stores that others write: a value must neither
    fill the screen nor command the terminal.
    """
    line = printable(without_passwords(" ".join(text.split())))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 3 :]}"


def printable(text: str) -> str:
    """Text with its control characters written out: those of names could command a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_passwords(text: str) -> str:
    """Text with the passwords and tokens of the addresses in it left out."""
    text = re.sub(r"(://[^\s:/@]*):[^\s/]*@", r"\1:***@", text)
    text = re.sub(r"\b(https?://)[^\s:/@]+@", r"\1***@", text)  # a token in the user's place
    named = r"(?i)([?&](?:password|passwd|pwd|token|sslpassword)=)[^\s&'\"]*"
    return re.sub(named, r"\1***", text)

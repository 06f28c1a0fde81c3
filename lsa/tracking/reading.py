"""Files of runs, wherever their runs say that they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lsa.runtime.errors import InputError, one_line
from lsa.tracking import store


class Broken(InputError):
    """A run does not hold what its step logs: others write into a store, and artifacts get lost."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Say in one line why something cannot be read.

    Whoever makes a run says where its files are: in a bucket without login, at an address that is
    none. MLflow and the libraries that it calls raise errors of many kinds then.

    Raises:
        Broken: It is not there.
        InputError: The store does not answer.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if store.away(error):
            raise InputError(f"cannot fetch {what}: {store.explained(error)}") from None
        raise Broken(f"{what} is not there ({one_line(error)}); run its step again") from None

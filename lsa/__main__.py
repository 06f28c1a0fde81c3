"""`python -m lsa` and the `lsa` command."""

from __future__ import annotations

import gc
import sys
import traceback
from types import TracebackType

from lsa.cli import app, streams
from lsa.runtime import heap, threads
from lsa.runtime.errors import without_passwords
from lsa.tracking import settings


def main() -> None:
    """Run the command line and exit with its code."""
    sys.excepthook = _unforeseen
    streams.prepare()
    threads.sleep_soon()
    heap.keep()
    # A tenth of a start is the search for garbage among what imports make, which all stays.
    gc.set_threshold(50_000, 20, 100)
    settings.quiet()
    code = app.run(sys.argv[1:])
    if code == app.EXIT_PIPE:
        streams.silence()
    sys.exit(code)


def _unforeseen(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback: MLflow writes the store's address, password and all, into its errors."""
    lines = traceback.format_exception(kind, error, trace)
    print(without_passwords("".join(lines)), end="", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The command that looks after the machine and the store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lsa.cli.show import JSON, print_json
from lsa.runtime.errors import printable

# A server that does not answer is not asked again for minutes.


def doctor(
    end_stale: Annotated[
        bool, typer.Option("--end-stale", help="end runs that are RUNNING, their process gone")
    ] = False,
    json: JSON = False,
) -> None:
    """Check versions, environment, device, disk, spool, store and runs; say what to do.

    The exit code is 1 when a check fails.

    Keys of --json, a list of: what, state (ok, warning or failure), found, advice.
    """
    from lsa.cli import examination
    from lsa.tracking import settings

    settings.answer_soon()

    checks = []
    for checked in examination.examine(end_stale=end_stale):
        checks.append(checked)
        if not json:
            advice = f"; {checked.advice}" if checked.advice else ""
            print(
                f"{checked.state:8} {checked.what:12} {printable(checked.found + advice)}",
                flush=True,
            )
    if json:
        print_json([asdict(checked) for checked in checks])
    if any(checked.state == "failure" for checked in checks):
        raise typer.Exit(1)

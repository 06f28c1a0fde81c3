"""The command that writes a project's explorer."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from lsa.cli.study import NAME, PROJECT
from lsa.runtime.errors import InputError


def explore(
    name: NAME = None,
    project: PROJECT = None,
    out: Annotated[str, typer.Option(help="folder for the page")] = ".",
    open: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Write a page to explore a project's checkpoints: one file that works without a network.

    It shows checkpoints by any two numbers, the loss between them, spectra and curves of those
    selected, the loss surface, and trainings epoch by epoch. Pointer, touch, keyboard and screen
    reader all work.
    """
    from lsa import project as projects
    from lsa.reports import explorer

    setting = projects.load(name or project or projects.DEFAULT)
    folder = Path(out)
    if not folder.is_dir():
        raise InputError(f"there is no folder {out}; make it, or give out=… another")
    page = folder / f"explorer-{setting.name}.html"
    page.write_text(explorer.page(setting), encoding="utf-8")
    print(page)
    if open:
        webbrowser.open(page.resolve().as_uri())

"""Run the faults and write the table."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "studies")]  # as pytest has them

from faults import Row  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
# Module -> what its section is called. A module that is not there keeps its section.
SECTIONS = {
    "server": "The server dies",
    "network": "Requests fail",
    "clients": "Clients stop, lose a worker, share a store, or have wrong clocks",
    "kills": "Clients are killed at random",
    "checkpoints": "Checkpoints are damaged",
    "disk": "Disks are full or cannot be written",
    "inputs": "Input is malformed",
    "suite": "Stores, servers and terminals are shared with others",
}
TOP = """# What faults cost

This page lists faults that lsa was tried with, and what each cost. Every row was produced by real
processes: `python -m tests.faults` injects the fault, checks the store afterwards, and fails if a
measured result is missing or stored twice. "Times" is how often the fault was injected.
"""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="run this module alone")
    only = parser.parse_args().only
    present = [name for name in SECTIONS if (Path(__file__).parent / f"{name}.py").exists()]
    sections = written(PAGE)
    for name in [only] if only else present:
        module = importlib.import_module(f"faults.{name}")
        with tempfile.TemporaryDirectory(prefix="lsa-faults-") as folder:
            sections[SECTIONS[name]] = table(module.rows(Path(folder)))
        PAGE.write_text(page(sections), encoding="utf-8")
        print(f"{name}: {PAGE.relative_to(ROOT)}")


def written(path: Path) -> dict[str, str]:
    """Sections of the page by title."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return dict(re.findall(r"^## (.+?)\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def page(sections: dict[str, str]) -> str:
    """The whole page, its sections in order."""
    titles = [title for title in SECTIONS.values() if title in sections]
    return TOP + "".join(f"\n## {title}\n\n{sections[title].strip()}\n" for title in titles)


def table(rows: Sequence[Row]) -> str:
    """The rows of a module, under when and where they were measured."""
    lines = [
        "| fault | injected how | times | lost | what the user sees |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.fault, row.injected, str(row.times), row.lost, row.seen)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return f"{machine()}, {date.today()}.\n\n" + "\n".join(lines) + "\n"


def machine() -> str:
    """What ran them."""
    return f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()

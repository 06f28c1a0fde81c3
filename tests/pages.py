"""The pages of the documentation, by name, and what is in their fences."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}


def fences(words: str) -> list[tuple[str, str]]:
    """Page and content of every block whose first line is ``` and matches `words`."""
    fence = re.compile(rf"^```(?:{words})\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(n, block) for n, page in PAGES.items() for block in fence.findall(page.read_text())]

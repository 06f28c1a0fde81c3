"""Links of the pages and notebooks lead to files that are there, and to headings that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pages import DOCS, PAGES, ROOT

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SOURCES = {**PAGES, "CHANGELOG.md": ROOT / "CHANGELOG.md"}
SOURCES |= {str(book.relative_to(ROOT)): book for book in NOTEBOOKS}


def text(page: Path) -> str:
    """A page's text without its fences, or that of a notebook's Markdown cells."""
    whole = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(whole)["cells"]
        whole = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", whole, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link may name after #: the headings, as GitHub and MyST both spell them."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in plain}


@pytest.mark.parametrize("name", SOURCES)
def test_links_of_a_page_lead_somewhere(name):
    page = SOURCES[name]
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    """In a list `{toctree}`, whose entries are `page` or `title <page>`."""
    named = {DOCS / "index.md"}
    for page in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            for line in tree.splitlines():
                entry = re.sub(r".*<(.*)>", r"\1", line.strip())
                if entry and not entry.startswith(":"):
                    named |= {page.parent / f"{entry}{end}" for end in (".md", ".ipynb")}
    assert {*DOCS.rglob("*.md"), *NOTEBOOKS} <= named


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.stem)
def test_a_notebook_is_stored_without_outputs(book):
    """`make docs` runs it: what is shown is what today's code prints."""
    cells = json.loads(book.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)

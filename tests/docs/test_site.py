"""The built site asks no network, and its search and reference know every probe and public name."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from browsing import browser, open_file, violations  # noqa: F401 (the fixtures)
from pages import DOCS

import lsa

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it, but for the notebooks, which are not run."""
    build = pytest.importorskip("sphinx.cmd.build")
    pytest.importorskip("myst_nb")
    folder = tmp_path_factory.mktemp("docs")
    options = ["-q", "-W", "-b", "html", "-D", "nb_execution_mode=off", "-d", str(folder / "trees")]
    assert build.build_main([*options, str(DOCS), str(folder / "site")]) == 0
    return folder / "site"


def test_no_page_loads_anything_from_a_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        assert not LOADED.search(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", style.read_text()), style


def test_every_public_name_can_be_looked_up(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert {f"lsa.{name}" for name in dir(lsa)} <= known


def test_the_search_knows_the_words_of_the_field(site):
    index = (site / "searchindex.js").read_text()
    # Words are kept by their stems, as the search stems what is asked for.
    assert all(f'"{stem}":' in index for stem in ("hessian", "lanczo", "barrier", "slurm"))


@pytest.mark.parametrize("width", [1600, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_no_page_scrolls_sideways(site, open_file, scheme, width):  # noqa: F811
    for name in ("index", "gallery", "start", "probes/lanczos", "benchmarks", "api/probes"):
        viewport = {"width": width, "height": 900}
        page = open_file(site / f"{name}.html", color_scheme=scheme, viewport=viewport)
        assert violations(page) == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_the_search_works_from_files_alone(site, open_file):  # noqa: F811
    page = open_file(site / "index.html")
    page.locator("input[name=q]").first.fill("barrier")
    page.keyboard.press("Enter")
    page.locator("#search-results li a", has_text="auto_neb").first.wait_for()

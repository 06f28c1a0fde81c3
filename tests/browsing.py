"""Pages in a real browser; a test module imports the fixtures that it uses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SLOW = re.compile("GL Driver Message.*Performance|willReadFrequently")  # WebGL without a card
MARKS = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_file(browser):
    """Opens a file; afterwards nothing may have gone wrong or been asked of a network."""
    said: list[str] = []
    contexts = []

    def opened(file: Path, script: str = "", **options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.add_init_script(script)
        page.on("console", lambda m: SLOW.search(m.text) or said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or said.append(r.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def violations(page: Page) -> list[tuple[str, list[str]]]:
    """What axe finds, with the elements."""
    # Without preloading, which would ask for the style sheets again: from files it may not.
    found = Axe().run(page, options={"preload": False}).response["violations"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]

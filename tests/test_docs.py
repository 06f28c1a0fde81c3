"""The pages of the probes say what the declarations say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lsa import probe

PAGES = Path(__file__).parent.parent / "docs" / "probes"
OWN = [name for name, module in probe.modules().items() if module.startswith("lsa.probes.")]


def rows(name: str, section: str) -> list[list[str]]:
    """Cells of the table in a section of a probe's page, without its heading."""
    page = (PAGES / f"{name}.md").read_text()
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table[2:]]
    return [[cell.replace("\\|", "|") for cell in row] for row in cells]


@pytest.mark.parametrize("name", OWN)
def test_every_option_stands_in_its_page_with_its_default_and_help(name):
    written = {option.strip(): (default, text) for option, default, text in rows(name, "Options")}
    declared = probe.find(name).options
    assert written.keys() == {f"`{option}`" for option in declared}
    for option in declared.values():
        default, text = written[f"`{option.name}`"]
        assert default.strip() == f"`{option.default}`", option.name
        assert text.strip().startswith(option.help), option.name


@pytest.mark.parametrize("name", OWN)
def test_every_headline_number_stands_in_its_page(name):
    written = {key for row in rows(name, "Metrics") for key in re.findall(r"`(\w+)`", row[0])}
    assert set(probe.find(name).headline) <= written


@pytest.mark.parametrize("name", OWN)
def test_a_page_has_every_part_and_a_small_figure(name):
    page = (PAGES / f"{name}.md").read_text()
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert sections == [
        "Formula", "What it means", "What it does not mean", "Options", "Metrics", "Source",
    ]  # fmt: skip
    assert page.startswith(f"# `{name}`:")
    assert 0 < (PAGES / f"{name}.png").stat().st_size < 150_000
    assert f"(docs/probes/{name}.md)" in (PAGES.parents[1] / "README.md").read_text()


def test_the_readme_measures_a_model_of_ones_own(capsys):
    readme = (PAGES.parents[1] / "README.md").read_text()
    block = readme.split("\n## Your own model\n")[1].split("```python\n")[1].split("```")[0]
    printed: dict = {}
    exec(block, printed)
    told = capsys.readouterr().out
    assert told.startswith("lanczos: converged\nlambda_max ")
    assert f" {printed['result'].metrics['lambda_max'].value:.6g} loss " in told


def test_the_gallery_has_a_figure_of_every_probe():
    text = (PAGES.parent / "gallery.md").read_text()
    for name in OWN:
        assert f"(probes/{name}.png)](probes/{name}.md)\n\n  **[`{name}`]" in text, name


def test_no_page_is_left_of_a_probe_that_is_gone():
    studies_of_probes = {"mode_graph"}
    assert {page.stem for page in PAGES.glob("*.md")} == {*OWN, *studies_of_probes, "index"}

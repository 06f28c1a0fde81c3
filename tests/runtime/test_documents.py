"""JSON and YAML within bounds."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lsa.runtime import documents
from lsa.runtime.errors import InputError

LAUGHS = "a0: &a0 [lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)
HOSTILE = {
    "a billion laughs": LAUGHS,
    "a billion merges": MERGES,
    "itself": "a: &a [*a]",
    "itself as a key": "&a {*a : 1}",
    "deep": "[" * 50_000,
    "deep and closed": "[" * 60 + "]" * 60,
    "deep blocks": "\n".join(" " * i + "- " for i in range(400)),
    "large": "a: " + "x" * (300 << 10),
    "many": "[" + "1," * 30_000 + "]",
    "code": "!!python/object/apply:os.system ['touch ran']",
    "a name": "a: !!python/name:os.system",
    "no integer": "a: !!int ''",
    "no float": "a: !!float x",
    "no date": "a: !!timestamp x",
    "no month": "a: 2020-13-45",
    "no boolean": "a: !!bool perhaps",
    "a large integer": "a: " + "9" * 10_000,
    "a list as a key": "? [a]\n: b",
    "two documents": "a: 1\n---\nb: 2",
    "control characters": "a: \x07",
    "a tab": "a:\n\t- b",
    "no alias": "a: *b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_at_once_and_in_one_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        documents.read_yaml(tmp_path / "p.yaml")
    assert time.process_time() - began < 10
    assert "p.yaml" in str(caught.value) and str(caught.value).isprintable()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a: \x80", b"\x00\x00\x00"])
def test_bytes_that_are_no_text_are_refused(tmp_path, data):
    (tmp_path / "p.yaml").write_bytes(data)
    with pytest.raises(InputError):
        documents.read_yaml(tmp_path / "p.yaml")


def test_a_folder_or_nothing_in_place_of_a_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="cannot be read"):
            documents.read_yaml(path)
        with pytest.raises(InputError, match="cannot be read"):
            documents.read_json(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(values)
def test_within_the_bounds_yaml_and_json_say_what_their_own_libraries_read(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("documents")
    text = yaml.safe_dump(value, allow_unicode=False)
    (folder / "v.yaml").write_text(text, encoding="utf-8")
    assert documents.read_yaml(folder / "v.yaml") == yaml.safe_load(text)
    (folder / "v.json").write_text(documents.json.dumps(value), encoding="utf-8")
    assert documents.read_json(folder / "v.json") == value


def test_aliases_and_merges_of_honest_files_work(tmp_path):
    (tmp_path / "p.yaml").write_text("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n")
    found = documents.read_yaml(tmp_path / "p.yaml")
    assert found == {"a": {"x": 1, "y": 2}, "b": found["a"], "c": {"x": 1, "y": 3}}
    (tmp_path / "p.yaml").write_text("")
    assert documents.read_yaml(tmp_path / "p.yaml") is None


@pytest.mark.parametrize(
    "text",
    ["a: 1\nb: 2\na: 3\n", "x: {lr: 1, 'lr': 2}\n", "a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n"],
)
def test_two_keys_of_one_name_are_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=r"has the key '\w+' twice, in lines \d and \d"):
        documents.read_yaml(tmp_path / "p.yaml")


def test_json_beyond_the_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "JSON_SIZE", 1 << 20)
    for text, message in (
        ("[" * 50 + "]" * 50, "nests"),
        ("[" * 10**5, "not readable JSON"),
        ("1" * 10_000, "not readable JSON"),
        ('"' + "x" * (2 << 20) + '"', "kB"),
    ):
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(InputError, match=message):
            documents.read_json(tmp_path / "v.json")

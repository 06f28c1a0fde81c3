"""Addresses of stores: many spellings, one name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lsa.runtime.errors import InputError
from lsa.tracking import address, store

ODD = ("s p", "50%41", "a#b", "do$l", "ünï", 'q"uo', "it's")


@pytest.mark.parametrize(
    "spellings",
    [
        ("http://127.0.0.1:5000", "http://localhost:5000/", "HTTP://me:secret@LOCALHOST:5000"),
        ("https://host", "https://host:443/", "https://token@Host"),
        ("postgres://a:b@host/lsa", "postgresql+psycopg://host:5432/lsa", "postgresql://host/lsa"),
        ("mysql+pymysql://host/lsa", "mysql://me@host:3306/lsa"),
    ],
)
def test_all_spellings_of_a_store_are_one(spellings):
    assert len({address.canonical(one) for one in spellings}) == 1
    assert "secret" not in address.canonical(spellings[-1])
    assert len({address.step_name(one, "key") for one in spellings}) == 1
    assert address.step_name(spellings[0], "other") != address.step_name(spellings[0], "key")


def test_stores_that_differ_have_names_that_differ():
    stores = ("http://host:5000", "http://host:5001", "https://host:5000", "http://host:5000/team")
    assert len({address.canonical(one) for one in stores}) == len(stores)


def test_a_sqlite_file_is_named_by_its_path_without_links(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "link")
    spellings = (
        "sqlite:///m.db",
        f"sqlite:///{tmp_path}/link/m.db",
        f"sqlite:///{tmp_path}/real/m.db",
    )
    assert {address.canonical(one) for one in spellings} == {f"sqlite:///{tmp_path}/real/m.db"}


def test_a_relative_file_is_resolved_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert address.absolute("sqlite:///a/rel.db") == f"sqlite:///{os.getcwd()}/a/rel.db"
    for full in ("sqlite:////a/m.db", "http://host:5000", "sqlite:///:memory:", "sqlite://"):
        assert address.absolute(full) == full


@pytest.mark.parametrize("name", ODD)
def test_the_default_address_is_decoded(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    try:
        assert address.file_of(store.uri()) == tmp_path / name / "mlflow.db"
    finally:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_store_is_made_and_used_in_a_folder_of_any_name(tmp_path, monkeypatch):
    folder = tmp_path / "".join(ODD).replace("%41", "%")  # of which MLflow would make an A
    folder.mkdir()
    monkeypatch.chdir(folder)
    former, uri = store.addresses(), address.of_file(folder / "mlflow.db")
    store.use(uri, uri)
    try:
        made = store.client().create_run("0")
        store.client().log_text(made.info.run_id, "text", "a.txt")
        assert not store.client().search_model_versions("")
    finally:
        store.use(*former)
    assert (folder / "mlflow.db").is_file() and list((folder / "mlruns").rglob("a.txt"))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_path_that_no_address_can_hold_is_refused(monkeypatch):
    monkeypatch.setattr(address, "file_of", lambda uri: None)
    with pytest.raises(InputError, match=r"the path /what\?/m\.db holds a '\?'"):
        address.of_file(Path("/what?/m.db"))

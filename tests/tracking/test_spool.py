"""The spool: entries are there whole or not at all, and what is damaged is set aside."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import furnish
from plug import Plug, runs, trained_without

import lsa
from lsa import project
from lsa.cli import app
from lsa.runtime import variables
from lsa.runtime.errors import InputError
from lsa.studies import train
from lsa.tracking import spool, store, sync

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]


def entry(key: str = "k" * 64, **values) -> spool.Entry:
    return spool.begin(key, spool.Content("probe-sgd-s0", "tiny", "here", **values))


def test_an_entry_is_there_whole_or_not_at_all(workplace):
    begun = entry(tags={"lsa.key": "k" * 64})
    begun.file("folder/a.txt").write_text("a")
    assert spool.entries() == [] and spool.find("k" * 64, "here") is None
    begun.keep()
    (path,) = spool.entries()
    found = spool.read(path)
    assert found.content == begun.content and found.files() == ["folder/a.txt"]
    assert spool.find("k" * 64, "elsewhere") is None
    found.drop()
    assert spool.entries() == []


def test_an_entry_of_another_store_or_process_is_left_alone(workplace):
    """One is kept, one is being written, and each belongs to the same step."""
    kept = entry(tags={"lsa.key": "k" * 64})
    kept.file("a.txt").write_text("a")
    kept.keep()
    written = entry()
    written.file("b.txt").write_text("b")
    with written.checkpoint("000001"):
        pass
    for store_of_other in ("here", "elsewhere"):
        other = spool.begin("k" * 64, spool.Content("probe-sgd-s0", "tiny", store_of_other))
        assert other.files() == [] and other.checkpoints() == []
        other.keep()
        other.drop()
    assert spool.entries() == [kept.path] and kept.files() == ["a.txt"]
    assert written.files() == ["b.txt"] and len(written.checkpoints()) == 1


def test_a_checkpoint_counts_once_it_is_whole_and_outlives_its_process(workplace):
    begun = entry()
    with pytest.raises(KeyboardInterrupt), begun.checkpoint("000001") as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert begun.checkpoints() == []
    with begun.checkpoint("000002") as folder:
        (folder / "weights").write_text("whole")
    begun.leave()
    assert [path.name for path in entry().checkpoints()] == ["000002"]


def test_a_clock_that_is_set_back_makes_no_run_end_before_it_began(workplace, monkeypatch):
    begun = entry()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    begun.keep()
    assert 0 <= begun.content.ended - begun.content.started < 60_000


def test_a_folder_where_nothing_can_be_written_is_refused_in_one_line(workplace, monkeypatch):
    (workplace / "file").write_text("")
    monkeypatch.setenv(variables.SPOOL, str(workplace / "file" / "spool"))
    with pytest.raises(InputError, match=r"cannot write to the spool .*/file/spool \(Not a dir"):
        entry()


def change(file: str, /, **values: object) -> Callable[[Path], None]:
    """Other values in a JSON file of an entry; None removes one."""

    def changed(path: Path) -> None:
        (found,) = path.rglob(file)
        content = json.loads(found.read_text()) | values
        found.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))

    return changed


def cut(file: str, size: int) -> Callable[[Path], None]:
    """Cut a file of an entry."""
    return lambda path: os.truncate(next(path.rglob(file)), size)


DAMAGES = {
    "no key": change("run.json", tags={}),
    "no tags": change("run.json", tags=None),
    "no name": change("run.json", name="removed"),
    "metrics": change("run.json", metrics=[{"key": "loss", "value": "junk"}]),
    "dataset": change("run.json", dataset={"name": "digits"}),
    "run cut": cut("run.json", 40),
    "run lost": lambda path: (path / "run.json").unlink(),
    "about cut": cut("about.json", 40),
    "about lost": lambda path: next(path.rglob("about.json")).unlink(),
    "about incomplete": change("about.json", epoch="removed"),
    "weights cut": cut("weights.safetensors", 1),
    "weights lost": lambda path: next(path.rglob("weights.safetensors")).unlink(),
}


@pytest.fixture(scope="module")
def training_kept(tmp_path_factory, new_store) -> Path:
    """The entry of a training that no store has taken; its working folder."""
    folder = tmp_path_factory.mktemp("away")
    with pytest.MonkeyPatch.context() as patch:
        furnish(folder, patch, new_store)
        store.client()
        Plug(patch).pull()
        with pytest.raises(spool.NotLogged):
            train.train(project.load("tiny").recipe("sgd"))
    return folder


def test_damaged_entries_are_set_aside_and_the_others_delivered(
    workplace, training_kept, caplog, capsys
):
    shutil.copytree(training_kept / ".lsa", ".lsa")
    (whole,) = spool.entries()
    content = json.loads((whole / "run.json").read_text())
    mlflow_uri = store.shown(store.uri())
    change("run.json", store=mlflow_uri, registry=mlflow_uri)(whole)
    elsewhere = spool.folder() / "elsewhere"
    shutil.copytree(whole, elsewhere)
    change("run.json", store="http://elsewhere")(elsewhere)
    for i, (name, damage) in enumerate(DAMAGES.items()):
        path = spool.folder() / f"{i:02} {name}"
        shutil.copytree(whole, path)
        damage(path)
        os.utime(path, (i, i))  # all before the whole one
    assert content["store"] != mlflow_uri
    ends = list(sync.sync())
    stay = [end for _, end in ends if not end.startswith("run ")]
    assert len(ends) == len(DAMAGES) + 2 and len(stay) == len(DAMAGES) + 1
    assert sum("is for the store http://elsewhere" in end for end in stay) == 1
    aside = [end for end in stay if "it is kept in .lsa/spool/damaged/" in end]
    assert len(aside) == len(DAMAGES) and all("\n" not in end for end in aside)
    assert spool.entries() == [elsewhere] and len(spool.damaged()) == len(DAMAGES)
    (found,) = runs()  # and none left open
    assert found.info.status == "FINISHED"
    assert lsa.load(found.info.run_id).epoch == 2
    assert app.run(["doctor"]) == 0
    assert f"{len(DAMAGES)} damaged" in capsys.readouterr().out


def test_a_damaged_entry_does_not_keep_its_step_from_being_measured(workplace, plug, caplog):
    recipe = trained_without(plug)
    (path,) = spool.entries()
    cut("weights.safetensors", 1)(path)
    assert not train.train(recipe, reuse=True).reused
    assert "it is kept in .lsa/spool/damaged/" in caplog.text and spool.entries() == []


def test_an_entry_that_another_process_delivers_meanwhile_breaks_nothing(workplace, monkeypatch):
    store.client()
    gone, there = spool.folder() / "gone", spool.folder() / "there"
    there.mkdir(parents=True)
    monkeypatch.setattr(Path, "glob", lambda *_: iter([gone, there]))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    assert spool.entries() == [there]
    monkeypatch.setattr(spool, "entries", lambda: [gone])
    monkeypatch.setattr(sync.stream, "deliver", lambda: iter(()))
    assert list(sync.sync()) == []

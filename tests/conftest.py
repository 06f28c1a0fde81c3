"""Fixtures: an empty folder with its own MLflow store, and a project that trains at once."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch

PROJECT = """
dataset: {name: digits, train_limit: 200, val_limit: 100}
model: {name: mlp, hidden: [16]}
train: {epochs: 2, batch_size: 50}
optimizers:
  sgd: {name: SGD, lr: 0.1}
  adamw: {name: AdamW, lr: 0.01}
seeds: [0]
landscape: {samples: 64}
probes: {lanczos: {k: 2}}
"""


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """SIGINT as on a terminal, also where a shell started the tests in the background, deaf to it.

    Processes that the tests start inherit it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def global_rng_untouched():
    """The global random state is the caller's: a test fails when lsa changes it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global torch RNG was used"


@pytest.fixture
def double():
    """Networks and data in float64, from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which nothing is yet: to make one takes MLflow two seconds, to copy it none."""
    from lsa.tracking import store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.make_whole(path)
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Path) -> Path:
    """A folder with a tiny project and its own store, as the current folder."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "projects").mkdir()
    (tmp_path / "projects" / "tiny.yaml").write_text(PROJECT)
    shutil.copy(new_store, tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture
def trained(workplace: Path):
    """The finished training of sgd in the tiny project."""
    from lsa import project
    from lsa.studies import train

    return train.train(project.load("tiny").recipe("sgd"))

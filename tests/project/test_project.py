"""Project files: what is read, what is refused and how."""

from __future__ import annotations

import pytest

from lsa import project
from lsa.probe import find
from lsa.runtime.errors import InputError

BASE = "dataset: {name: digits}\nmodel: {name: mlp}\noptimizers: {sgd: {name: SGD, lr: 0.1}}\n"
KEEPING = "train: {checkpoint_every: 2}\n"


@pytest.fixture
def written(tmp_path):
    def load(text: str) -> project.Project:
        (tmp_path / "p.yaml").write_text(text)
        return project.load(str(tmp_path / "p.yaml"))

    return load


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion_mnist"])
def test_shipped_projects_are_valid(name):
    found = project.load(name)
    assert found.name == name
    assert set(found.optimizers) == {"sgd", "sgd_momentum", "adamw"}


def test_cifar10_is_the_reference_study():
    found = project.load("cifar10")
    recipe = found.recipe("sgd_momentum")
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.seed) == (12, 128, 42)
    assert recipe.rule.options == {"lr": 0.01, "weight_decay": 5e-4, "momentum": 0.9}
    assert recipe.model.options == {"width": 64, "init": "kaiming_normal"}
    assert found.recipe("adamw").rule.options["weight_decay"] == 5e-4


def test_overrides_reach_the_recipe_and_no_others(written):
    recipe = written(BASE).recipe("sgd", 7, epochs=3, lr=0.5, batch_size=None)
    assert (recipe.seed, recipe.train.epochs, recipe.rule.options["lr"]) == (7, 3, 0.5)
    assert recipe.train.batch_size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "trian: {epochs: 3}", "unknown key 'trian'. Did you mean 'train'"),
        (BASE + "train: {epoch: 3}", "unknown key 'train.epoch'. Did you mean 'epochs'"),
        (BASE + "train: {epochs: 0}", "train.epochs=0 must be"),
        (BASE + "seeds: []", "seeds=[] must be a list of at least 1 item; correct it"),
        (
            BASE.replace("sgd:", "größe λ:"),
            "optimizers: 'größe λ' must be a name of the letters A to z, digits, _ and -",
        ),
        (BASE + "seeds: [1, 0, 1]", "distinct: a seed given twice is the same training"),
        (BASE + BASE, "has the key 'dataset' twice, in lines"),
        (BASE + "train: {epochs: x}", "train.epochs='x' must be"),
        (BASE + "probes: {lanczo: {}}", "unknown probe 'lanczo'; did you mean 'lanczos'"),
        (BASE + "probes: {lanczos: {kk: 3}}", "no option 'kk'. Did you mean 'k'"),
        (BASE + "probes: {lanczos: {k: abc}}", "k='abc' must be"),
        (BASE + "train: {checkpoint_every: -1}", "train.checkpoint_every=-1 must be"),
        (BASE + "trajectory: {lanczos: {}}", "set train.checkpoint_every"),
        (BASE + KEEPING + "trajectory: {lanczos: {kk: 3}}", "no option 'kk'"),
        (BASE + KEEPING + "trajectory: {interpolation: {}}", "takes two checkpoints"),
        (BASE + KEEPING + "trajectory: {intrinsic_dim: {}}", "trains from the initial weights"),
        (BASE + "pairs: {lanczos: {}}", "belongs under `probes:`"),
        ("model: {name: mlp}", "dataset"),
        ("- 1", "must hold sections"),
        ("a: [", "not readable YAML"),
    ],
)
def test_bad_files_are_refused_in_one_line(written, text, message):
    with pytest.raises(InputError) as caught:
        written(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_answered_with_the_nearest(written):
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        project.load("cifar")
    with pytest.raises(InputError, match="names sgd"):
        written(BASE).recipe("sdg")


def test_kept_epochs_are_the_first_every_nth_and_the_last(written):
    def kept(every: int) -> list[int]:
        budget = written(BASE + f"train: {{epochs: 7, checkpoint_every: {every}}}").train
        return [epoch for epoch in range(8) if budget.keeps(epoch)]

    assert (kept(0), kept(3), kept(7), kept(9)) == ([7], [0, 3, 6, 7], [0, 7], [0, 7])


def test_a_trajectory_has_options_of_its_own(written):
    found = written(BASE + KEEPING + "probes: {lanczos: {k: 5}}\ntrajectory: {lanczos: {tol: 0.1}}")
    declared = find("lanczos")
    assert found.options(declared)["k"] == 5
    along = found.options(declared, trajectory=True)
    assert (along["k"], along["tol"]) == (declared.options["k"].default, 0.1)


def test_bare_yes_and_no_are_words(written):
    """YAML reads them as booleans."""
    declared = find("lanczos")
    for word, expected in (("no", "no"), ("yes", "yes"), ('"no"', "no")):
        found = written(BASE + f"probes: {{lanczos: {{split: {word}}}}}")
        assert found.options(declared)["split"] == expected

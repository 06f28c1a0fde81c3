"""The trust rule for imported names, and the checks on options."""

import sys

import pytest
import torch
from torch import nn

from lsa.project import factories
from lsa.runtime.errors import InputError


@pytest.fixture
def foreign_package(tmp_path, monkeypatch):
    package = tmp_path / "foreign_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("def make():\n    return 'made'\n\nconstant = 3\n")
    (package / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "foreign_nets"
    for name in [name for name in sys.modules if name.partition(".")[0] == "foreign_nets"]:
        del sys.modules[name]


def test_foreign_code_does_not_run_without_trust(foreign_package):
    with pytest.raises(InputError, match=r"'foreign_nets'.*--trust foreign_nets"):
        factories.load("foreign_nets.nets:make", nn.Module, trusted=["other"])
    assert "foreign_nets" not in sys.modules


def test_trust_is_by_whole_package_name(foreign_package):
    with pytest.raises(InputError, match="not trusted"):
        factories.load(
            "foreign_nets.nets:make", nn.Module, trusted=["foreign", "foreign_nets.nets"]
        )


def test_trusted_package_offers_any_callable(foreign_package):
    assert factories.load("foreign_nets.nets:make", nn.Module, trusted=["foreign_nets"])() == "made"


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn:init",
        "torch.nn.functional:relu",
        "torchvision.models:get_model",
        "lsa.training.models:build",
        "torch.optim:SGD",  # a class, but not of networks
    ],
)
def test_without_trust_installed_packages_offer_only_classes_of_the_kind(name):
    with pytest.raises(InputError, match=r"not a subclass of Module|no class or function"):
        factories.load(name, nn.Module, trusted=())


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub:load",  # downloads code and runs it
        "torch:load",
        "torch.utils.cpp_extension:load",
        "torch.utils.tensorboard:SummaryWriter",
        "torch.jit:ScriptModule",
        "torch.nnx:Linear",
        "torchvision.datasets:CIFAR10",
        "lsa.cli:run",
        "lsa:study",
    ],
)
def test_without_trust_modules_that_hold_something_else_are_not_even_imported(name, monkeypatch):
    monkeypatch.setattr(factories.importlib, "import_module", lambda name: pytest.fail(name))
    with pytest.raises(InputError, match="is in none of the modules"):
        factories.load(name, nn.Module, trusted=())


def test_class_of_the_kind_needs_no_trust():
    assert factories.load("torch.optim:SGD", torch.optim.Optimizer, ()) is torch.optim.SGD


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foreign_nets.nets:mke", "no class or function 'mke'. Did you mean 'make'"),
        ("foreign_nets.nets:constant", "no class or function 'constant'"),
        ("foreign_nets.broken:make", "a_package_that_is_not_there"),
        ("foreign_nets.absent:make", "cannot be imported"),
    ],
)
def test_what_cannot_be_found_is_named(foreign_package, name, message):
    with pytest.raises(InputError, match=message):
        factories.load(name, nn.Module, trusted=["foreign_nets"])


@pytest.mark.parametrize(
    "name", [":make", "foreign_nets:", ".nets:make", "a b:c", "a:b:c", "a/b:c"]
)
def test_malformed_names_are_refused(name):
    with pytest.raises(InputError, match=r"package\.module:attribute"):
        factories.load(name, nn.Module, trusted=["foreign_nets", "a"])


def test_nearest_ignores_case_and_admits_defeat():
    assert factories.nearest("sgd", ["SGD", "Adam"]) == " Did you mean 'SGD'?"
    assert factories.nearest("quite different", ["SGD", "Adam"]) == ""


def test_numbers_written_as_text_are_read():
    # YAML 1.1 reads 1e-3, without a point, as text.
    options = {"lr": "1e-3", "momentum": 1, "nesterov": True}
    checked = factories.check_options("SGD", torch.optim.SGD, options, ["params"])
    assert checked == {"lr": 0.001, "momentum": 1, "nesterov": True}
    betas = factories.check_options("Adam", torch.optim.Adam, {"betas": [0.5, "0.9"]}, ["params"])
    assert betas == {"betas": (0.5, 0.9)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "abc"}, r"SGD: lr='abc' must be a valid number"),
        ({"lr": float("nan")}, "must be a finite number"),
        ({"lr": True}, "lr=True must be a number"),
        ({"nesterov": "perhaps"}, "nesterov='perhaps' must be a valid boolean"),
        ({"momentun": 0.9}, "no option 'momentun'. Did you mean 'momentum'. Its options are: lr,"),
        ({"params": []}, "no option 'params'"),
    ],
)
def test_bad_options_name_the_value_and_the_rule(options, message):
    with pytest.raises(InputError, match=message) as caught:
        factories.check_options("SGD", torch.optim.SGD, options, ["params"])
    assert "\n" not in str(caught.value)


def test_missing_option_is_named():
    def make(width):
        return width

    with pytest.raises(InputError, match="needs the option 'width'"):
        factories.check_options("model mine", make, {})


def test_foreign_functions_get_their_options_as_they_are():
    def make(width="auto", depth=3):
        return width, depth

    options = {"width": 4, "depth": "deep"}
    assert factories.check_options("model mine", make, options) == options

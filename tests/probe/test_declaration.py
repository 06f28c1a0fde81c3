"""The declaration of a probe: what is read from it, what is refused, how probes are found."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace
from typing import Annotated, Literal

import pytest

from lsa.cli.app import application
from lsa.probe import PROBES, Metric, Option, Result, probe, registry
from lsa.probe.declaration import COMMANDS
from lsa.runtime.errors import InputError


@pytest.fixture(autouse=True)
def clean_registry():
    """Forget what a test declares; a module is imported once, so lsa's own probes stay."""
    before = set(PROBES)
    yield
    for name in set(PROBES) - before:
        if not PROBES[name].function.__module__.startswith("lsa.probes."):
            del PROBES[name]


def test_one_declaration_gives_name_inputs_options_and_help():
    @probe(headline=("rise",))
    def bump(landscape, theta, rng, *, radius: Annotated[float, "step length"] = 0.1) -> Result:
        """Loss rise after a random step.

        More.
        """
        return Result({"rise": Metric(radius)})

    found = registry.find("bump")
    assert found.inputs == ("landscape", "theta", "rng") and not found.pair
    assert found.options["radius"] == Option("radius", float, 0.1, "step length")
    assert found.summary == "Loss rise after a random step."
    assert bump(None, None, None, radius=2).metrics["rise"].value == 2  # stays a plain function


def undocumented(theta) -> Result: ...


def unknown_input(weights) -> Result:
    """Doc."""
    ...


def no_default(theta, *, a: Annotated[int, "x"]) -> Result:
    """Doc."""
    ...


def no_help(theta, *, a: int = 1) -> Result:
    """Doc."""
    ...


def boolean(theta, *, a: Annotated[bool, "x"] = True) -> Result:
    """Doc."""
    ...


def keywords(theta, **rest) -> Result:
    """Doc."""
    ...


def help_not_text(theta, *, a: Annotated[int, 3] = 1) -> Result:
    """Doc."""
    ...


def study(theta) -> Result:
    """Doc."""
    ...


def selector(theta, *, seed_b: Annotated[int, "x"] = 1) -> Result:
    """Doc."""
    ...


def input_again(theta, *, rng: Annotated[int, "x"] = 1) -> Result:
    """Doc."""
    ...


def epochs_twice(theta, *, epochs: Annotated[int, "x"] = 1) -> Result:
    """Doc."""
    ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (study, "'study' has the name of a command"),
        (selector, "option 'seed_b' has a name that every probe has"),
        (input_again, "option 'rng' has a name"),
        (epochs_twice, "option 'epochs' has a name"),
        (undocumented, "no docstring"),
        (unknown_input, "unknown input 'weights'"),
        (no_default, "needs a default"),
        (no_help, "Annotated"),
        (boolean, "Literal"),
        (keywords, "unknown input 'rest'"),
        (help_not_text, "Annotated"),
    ],
)
def test_a_wrong_declaration_is_refused_at_import(function, message):
    with pytest.raises(TypeError, match=message):
        probe()(function)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"headline": "rise"}, r"headline is text; write \('rise',\)"),
        ({"headline": ("rise",), "compare": ("fall",)}, "'fall', which is not in headline"),
    ],
)
def test_what_a_report_would_pass_over_is_refused_at_import(given, message):
    def bump(theta) -> Result:
        """Doc."""
        ...

    with pytest.raises(TypeError, match=message):
        probe(**given)(bump)


def test_every_command_of_lsa_is_a_name_that_no_probe_may_have():
    named = (
        c.name or getattr(c.callback, "__name__", "") for c in application().registered_commands
    )
    assert {*named} - {*registry.modules()} <= COMMANDS


def test_what_is_no_result_is_told_to_whoever_wrote_the_probe():
    @probe()
    def plain(theta):
        """Doc."""
        return {"rise": 1.0}

    with pytest.raises(TypeError, match=r"'plain' returns a dict; return lsa.Result"):
        registry.find("plain")(theta=None)


def test_unknown_probes_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'lanczos'"):
        registry.find("lanczo")


def test_third_party_probes_are_found_and_clashes_named(monkeypatch):
    def points(*found: EntryPoint):
        monkeypatch.setattr(registry, "entry_points", lambda group: found)

    points(EntryPoint("mine", "their_package.mine", "lsa.probes"))
    assert registry.modules()["mine"] == "their_package.mine"
    points(EntryPoint("lanczos", "their_package.mine", "lsa.probes"))
    with pytest.raises(InputError, match=r"both lsa\.probes\.lanczos and their_package\.mine"):
        registry.modules()


def test_a_pair_probe_takes_a_second_checkpoint_and_choices():
    @probe()
    def between(theta, theta_b, *, kind: Annotated[Literal["line", "arc"], "path"] = "line"):
        """Loss between two checkpoints."""

    found = registry.find("between")
    assert found.pair and found.options["kind"].type == Literal["line", "arc"]


def test_one_name_in_two_modules_is_refused():
    def declared_in(module: str):
        def twice(theta) -> Result:
            """Doc."""
            ...

        twice.__module__ = module
        return probe()(twice)

    declared_in("first")
    declared_in("first")  # a reload
    with pytest.raises(TypeError, match="declared in both first and second"):
        declared_in("second")


def test_a_module_without_its_probe_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_package", ModuleType("their_package"))
    point = EntryPoint("mine", "their_package", "lsa.probes")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,))
    with pytest.raises(InputError, match="their_package declares no probe named 'mine'"):
        registry.find("mine")


def test_a_declaration_is_called_with_inputs_and_options_by_name():
    seen = {}

    @probe()
    def called(theta, rng, report, *, size: Annotated[int, "a size"] = 2) -> Result:
        """A probe that tells what it was given."""
        report(1, 2, "half")
        seen.update(theta=theta, seed=rng.initial_seed(), size=size)
        return Result({})

    declared = PROBES["called"]
    assert declared(theta=1, validation="not taken", size=3).probe == "called"
    assert seen == {"theta": 1, "seed": 0, "size": 3}
    with pytest.raises(InputError, match="needs theta"):
        declared(size=3)
    with pytest.raises(InputError, match="no option 'sise'; known: size"):
        declared(theta=1, sise=3)


def test_an_input_with_a_default_may_be_missing():
    @probe()
    def lenient(theta, optimizer=None) -> Result:
        """A probe that can do without an optimizer."""
        return Result({}, notes=(f"optimizer {optimizer}",))

    assert PROBES["lenient"].optional == {"optimizer": None}
    assert PROBES["lenient"](theta=1).notes == ("optimizer None",)
    assert PROBES["lenient"](1, "of their own").notes == ("optimizer of their own",)


def test_a_checkpoint_in_place_of_its_landscape_is_refused_in_one_line():
    checkpoint = SimpleNamespace(landscape=None, theta=None)
    with pytest.raises(InputError, match=r"give its \.landscape") as refused:
        registry.find("lanczos")(checkpoint)
    assert "\n" not in str(refused.value)

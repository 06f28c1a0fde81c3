"""The declaration of a probe: what is read from it, what is refused, how probes are found."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Annotated

import pytest

from lsa import probe as declaration
from lsa.errors import InputError
from lsa.probe import PROBES, Metric, Result, probe


@pytest.fixture(autouse=True)
def registry():
    before = dict(PROBES)
    yield
    PROBES.clear()
    PROBES.update(before)


def test_one_declaration_gives_name_inputs_options_and_help():
    @probe(headline=("rise",))
    def bump(landscape, theta, rng, *, radius: Annotated[float, "step length"] = 0.1) -> Result:
        """Loss rise after a random step.

        More.
        """
        return Result({"rise": Metric(radius)})

    found = declaration.find("bump")
    assert found.inputs == ("landscape", "theta", "rng") and not found.pair
    assert found.options["radius"] == declaration.Option("radius", float, 0.1, "step length")
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


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (undocumented, "no docstring"),
        (unknown_input, "unknown input 'weights'"),
        (no_default, "needs a default"),
        (no_help, "Annotated"),
        (boolean, "Literal"),
    ],
)
def test_a_wrong_declaration_is_refused_at_import(function, message):
    with pytest.raises(TypeError, match=message):
        probe()(function)


def test_unknown_probes_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'lanczos'"):
        declaration.find("lanczo")


def test_summaries_are_the_docstrings_first_lines():
    for name, summary in declaration.summaries().items():
        assert summary == declaration.find(name).summary


def test_third_party_probes_are_found_and_clashes_named(monkeypatch):
    def points(*found: EntryPoint):
        monkeypatch.setattr(declaration, "entry_points", lambda group: found)

    points(EntryPoint("mine", "their_package.mine", "lsa.probes"))
    assert declaration.modules()["mine"] == "their_package.mine"
    points(EntryPoint("lanczos", "their_package.mine", "lsa.probes"))
    with pytest.raises(InputError, match=r"both lsa\.probes\.lanczos and their_package\.mine"):
        declaration.modules()

"""What is said where a probe would not fit, against the plan with the options that it names."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lsa import probe
from lsa.probe import Sizes
from lsa.project import resolve
from lsa.studies import cost
from lsa.studies.fitting import SETTINGS, shortfall

AT = Sizes(dimension=10**8, samples=4, training=4, validation=4)
RATES = cost.Rates(1, 3, 9, 5, 2, 6, memory=10**9, sizes=AT, graphs=1e9, spare=2 * 10**9, chunk=1)


def options(name, **given):
    declared = probe.find(name)
    return declared, resolve(declared, given, "test")


def test_a_probe_that_fits_says_nothing():
    assert shortfall(*options("lanczos"), RATES, 1e12) == ""


@pytest.mark.parametrize("name", sorted(probe.modules()))
def test_each_way_that_is_named_fits(name):
    declared, given = options(name)
    peak = cost.probing(declared, given, RATES).memory
    said = shortfall(declared, given, RATES, 0.97 * peak)
    assert said.startswith(f"{name} would not fit: {0.97 * peak / 1e9:.1f} GB are free")
    for option, value in re.findall(r"--([a-z-]+) (\w+) \(", said):
        key = option.replace("-", "_")
        changed = resolve(declared, given | {key: value}, "test")
        assert cost.probing(declared, changed, RATES).memory <= 0.97 * peak, (option, value)
    for setting, changed in SETTINGS.items():
        lighter = dataclasses.replace(RATES, **changed)
        fits = cost.probing(declared, given, lighter).memory <= 0.97 * peak
        assert fits == (f"{setting} (" in said)


def test_the_check_before_a_probe_may_be_what_does_not_fit():
    checked = dataclasses.replace(RATES, check=100.0)
    said = shortfall(*options("surface"), checked, 5e9)
    assert "it would with LSA_CONSISTENCY=off (" in said and "--" not in said


def test_options_that_help_together_are_named_together():
    declared, given = options("layers")
    checked = dataclasses.replace(RATES, check=100.0)
    said = shortfall(declared, given, checked, 14.5e9)
    assert re.search(r"with --.*LSA_GRAPH_MEMORY=0, LSA_CONSISTENCY=off together \(", said), said


def test_where_no_option_helps_it_says_so():
    said = shortfall(*options("lanczos"), RATES, 10**9)
    assert "no option makes it fit; take parameters of some layers" in said


def test_a_value_that_an_options_rule_forbids_is_not_named():
    declared, given = options("auto_neb", cycles=1, pivots=5)
    peak = cost.probing(declared, given, RATES).memory
    one = cost.probing(declared, given | {"pivots": 1}, RATES).memory
    assert "--pivots 1 (" in shortfall(declared, given, RATES, (one + peak) / 2 - 1e10)
    assert "--pivots 0" not in shortfall(declared, given, RATES, one - 1)

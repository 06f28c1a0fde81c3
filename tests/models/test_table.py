"""The table names tests that exist, and says of each case what its tests say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from models.__main__ import verdict
from models.table import CASES, REFUSED, Case

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_case_is_held_by_tests_that_exist(case):
    for test in case.tests:
        file, name = test.split("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert any(function.startswith(name.split("[")[0]) for function in functions), test


def test_cases_are_named_once():
    assert len({case.what for case in CASES}) == len(CASES) >= 70


def test_a_verdict_is_that_of_all_tests_of_a_case():
    case = Case("a", REFUSED, ("f::test_a", "f::test_b[x"))
    assert verdict(case, {"f::test_a": "passed", "f::test_b[x-1]": "passed"}) == REFUSED
    assert verdict(case, {"f::test_a": "passed", "f::test_b[x-1]": "failed"}) == "DOES NOT HOLD"
    assert verdict(case, {"f::test_a": "skipped", "f::test_b[y]": "passed"}) == "not tried"
    assert verdict(case, {}) == "DOES NOT HOLD"

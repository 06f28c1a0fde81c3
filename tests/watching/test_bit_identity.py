"""A training that is watched is the same to the last bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from watching.trainings import CASES

import lsa


def unwatched(*_: Any, **__: Any) -> Any:
    return contextlib.nullcontext()


def norms_alone(model: Any, optimizer: Any, *, scaler: Any = None, **_: Any) -> Any:
    return lsa.watch(model, optimizer, scaler=scaler, budget=None, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_norms_change_nothing(case: str):
    assert CASES[case](norms_alone) == CASES[case](unwatched)


def test_a_difference_would_show():
    def drawing(*_: Any, **__: Any) -> Any:
        torch.rand(1)
        return contextlib.nullcontext()

    assert CASES["dropout"](drawing) != CASES["dropout"](unwatched)

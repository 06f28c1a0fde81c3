"""Results read back from a run."""

from __future__ import annotations

import pytest

from lsa.probe import Metric
from lsa.runtime.errors import InputError
from lsa.tracking import results
from lsa.tracking.numbers import flat, numbers


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", ".hidden", "a\\b"])
def test_an_array_that_leads_out_of_its_run_is_refused(name):
    with pytest.raises(InputError, match="an array has no folder"):
        results._arrays("r1", [name])


def test_numbers_come_back_as_they_were_stored():
    metrics = {"a": Metric(1.0, errors={"data": 0.1, "probes": 0.2}), "b": Metric(-2.0)}
    assert numbers(flat("p", metrics)) == {f"p/{name}": metric for name, metric in metrics.items()}
    assert list(numbers({"p/a": 1.0, "p/x": 2.0}, curves=["p/x"])) == ["p/a"]

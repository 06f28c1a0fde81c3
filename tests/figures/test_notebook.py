"""What a notebook shows of a result."""

from __future__ import annotations

import base64
import re
import sys

import numpy as np
import torch
from torch import nn

from lsa import Curve, Landscape, Metric, Result
from lsa.landscape import flatten
from lsa.probe import find

HOSTILE = "<script>alert(1)</script>"
LINE = Curve(np.arange(3.0), np.arange(3.0), error=np.ones(3))


def images(page: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(r"base64,([^']+)'", page)]


def test_numbers_stand_with_errors_and_units_and_texts_are_escaped():
    metrics = {
        "rise": Metric(1.25, "loss", {"data": 0.031, "probes": 0.2}),
        HOSTILE: Metric(float("nan")),
    }
    page = Result(metrics, {"y": LINE}, notes=(HOSTILE,), converged=False)._repr_html_()
    row = "<th scope='row'>rise</th><td>1.25</td><td>0.031 (data), 0.2 (probes)</td><td>loss</td>"
    assert row in page and "<td>nan</td>" in page
    assert HOSTILE not in page and page.count("&lt;script&gt;") == 2
    assert "not converged" in page
    (png,) = images(page)
    assert png.startswith(b"\x89PNG")


def test_a_result_without_notes_and_curves_is_its_numbers():
    page = Result({"a": Metric(1.0)})._repr_html_()
    assert "<th scope='row'>a</th><td>1</td>" in page and "notes" not in page and not images(page)


def test_without_matplotlib_the_numbers_remain(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lsa.figures.draw")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("lsa.figures.draw", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Result({"a": Metric(1.0)}, {"y": LINE})._repr_html_()
    assert "<th scope='row'>a</th>" in page and not images(page)


def test_a_probes_result_has_the_probes_own_figure():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(20, 3)
    landscape = Landscape(model, x, torch.arange(20) % 2)
    result = find("lanczos")(landscape=landscape, theta=flatten(model), k=1, split="no")
    assert result.probe == "lanczos"
    page = result._repr_html_()
    assert "<th scope='row'>lambda_max</th>" in page and len(images(page)) == 1

"""On a GPU: the same training to the last bit, and the numbers that a CPU gives."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or sums of two runs differ

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watching import trainings
from watching.test_bit_identity import everything, norms_alone, single_samples, unwatched

import lsa

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore"),  # about kernels that are not deterministic
]


ALONE = {  # what steps on a GPU only
    "capturable": trainings.optimizer("AdamW", capturable=True),
    "capturable, one by one": trainings.optimizer("Adam", capturable=True, foreach=False),
}
CASES = trainings.CASES | ALONE


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch):
    """Kernels that give the same bits in every run."""
    monkeypatch.setattr(trainings, "DEVICE", "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("attach", [norms_alone, single_samples, everything])
@pytest.mark.parametrize("case", CASES)
def test_measurements_change_nothing(case: str, attach: trainings.Attach):
    bare = CASES[case](unwatched)
    assert CASES[case](unwatched) == bare, "two bare trainings differ"
    assert CASES[case](attach) == bare


def test_the_numbers_are_those_of_a_cpu():
    rows = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()
        x = torch.randn(64, 5, dtype=torch.float64)
        y = (x @ torch.randn(5, 3, dtype=torch.float64)).argmax(1)
        model, x, y = model.to(device), x.to(device), y.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        kinds = ["update", "noise", "sharpness", "lambda_max"]
        options = {"every": 3, "budget": None, "track": False, "strict": True}
        with lsa.watch(model, optimizer, batches=(x, y), measure=kinds, **options) as watch:
            for _ in range(6):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        rows[device] = [{k: v for k, v in row.items() if k != "overhead"} for row in watch.rows]
    for of_cpu, of_gpu in zip(rows["cpu"], rows["cuda"], strict=True):
        found = {k: v for k, v in of_gpu.items() if "residual" not in k}
        assert found == pytest.approx({k: of_cpu[k] for k in found}, rel=2e-3, abs=1e-6)

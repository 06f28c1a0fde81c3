"""Full float32 within the block, and the caller's choice after it."""

from __future__ import annotations

import pytest
import torch
from processes import forked

from lsa.landscape.derivatives.precision import full_float32

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul


@pytest.fixture(params=[True, False])
def chosen(request):
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = request.param
    yield request.param
    cudnn.allow_tf32, matmul.allow_tf32 = before


def test_the_block_does_not_round_and_leaves_the_choice(chosen):
    with pytest.raises(ArithmeticError), full_float32():
        assert not cudnn.allow_tf32 and not matmul.allow_tf32
        raise ArithmeticError
    assert cudnn.allow_tf32 == chosen and matmul.allow_tf32 == chosen


@pytest.mark.skipif(not hasattr(cudnn, "conv"), reason="this PyTorch has the first switches only")
def test_a_choice_by_pytorchs_newer_switches_is_kept_as_well():
    """In a process of its own: what they have set, the older ones cannot undo."""
    program = """
import torch
from lsa.landscape.derivatives.precision import full_float32
owners = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
owners[0].fp32_precision = "tf32"
owners[1].fp32_precision = "ieee"
owners[2].fp32_precision = "tf32"
before = [owner.fp32_precision for owner in owners]
with full_float32():
    assert "tf32" not in [owner.fp32_precision for owner in owners]
assert [owner.fp32_precision for owner in owners] == before
"""
    assert forked(code=program).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_product_on_a_gpu_does_not_round_to_tf32():
    from lsa.landscape import Landscape, flatten
    from lsa.training import models

    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 16, 16, generator=rng), torch.randint(10, (64,), generator=rng)
    model = models.build("simple_cnn", input_shape=(3, 16, 16), classes=10, seed=0)
    theta = flatten(model)
    v = torch.randn(len(theta), generator=rng)
    exact = Landscape(model, x, y).double().hessian(theta.double())(v.double())
    assert cudnn.allow_tf32, "PyTorch's default, or this would show nothing"
    found = Landscape(model, x.cuda(), y.cuda()).hessian(theta.cuda())(v.cuda()).cpu().double()
    assert (found - exact).norm() < 3e-4 * exact.norm()  # TF32 is off by 7e-3

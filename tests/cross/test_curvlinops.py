"""Products on simple_cnn against curvlinops, an independent library."""

from __future__ import annotations

import pytest
import torch

from lsa.landscape import Landscape, flatten
from lsa.training import models

pytestmark = pytest.mark.cross


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [
        ("HessianLinearOperator", "hessian", {}),
        ("GGNLinearOperator", "gauss_newton", {}),
        ("EFLinearOperator", "covariance", {"centred": False}),
    ],
)
def test_products_agree_with_curvlinops(theirs, ours, options):
    curvlinops = pytest.importorskip("curvlinops")
    model = models.build("simple_cnn", input_shape=(1, 8, 8), classes=10, seed=0, width=8).eval()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 8, 8, generator=rng)
    y = torch.randint(0, 10, (40,), generator=rng)
    theta = flatten(model)
    v = torch.randn(len(theta), generator=rng)
    product = getattr(Landscape(model, x, y, chunk=16), ours)(theta, **options)(v)
    operator = getattr(curvlinops, theirs)(
        model, torch.nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)],
        check_deterministic=False,
    )  # fmt: skip
    expected = operator @ v
    assert expected.norm() > 0
    assert (product - expected).norm() <= 1e-5 * expected.norm()

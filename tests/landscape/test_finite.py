"""A sample whose loss is not finite is named, whichever probe meets it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.finite import culprit
from lsa.probe import find
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def network(*bad: int) -> tuple[Landscape, Tensor]:
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(40, 4, generator=rng, dtype=torch.float64)
    x[list(bad), 1] = torch.nan
    return Landscape(model, x, torch.randint(3, (40,), generator=rng)), flatten(model)


@pytest.mark.parametrize("probe", ["lanczos", "sgd_noise", "layers", "sharpness", "perturbation"])
def test_a_single_nan_in_the_data_names_its_sample(probe: str) -> None:
    landscape, theta = network(17)
    with pytest.raises(InputError, match="the loss of sample 17 out of 40 is nan"):
        find(probe)(landscape=landscape, theta=theta)


def test_where_a_probe_does_not_fail_a_note_names_the_sample() -> None:
    landscape, theta = network(17)
    found = find("interpolation")(
        landscape=landscape, validation=network()[0], theta=theta, theta_b=theta + 1, points=5
    )
    assert any("sample 17 out of 40" in note for note in found.notes)


def test_several_samples_are_counted_and_a_diverged_checkpoint_blames_none() -> None:
    assert "sample 3 (and of 1 more) out of 40" in culprit(*network(3, 17))
    assert culprit(*network()) == ""
    landscape, theta = network()
    assert culprit(landscape, theta * torch.nan) == ""
    with pytest.raises(InputError, match="diverged"):
        find("lanczos")(landscape=landscape, theta=theta * torch.nan)

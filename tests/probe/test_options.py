"""Rules of probes' options: told where the options are read, before anything is computed."""

import math

import pytest

from lsa.probe import find, modules
from lsa.project import load
from lsa.project.project import resolve
from lsa.runtime.errors import InputError

# Each breaks one rule; the value beside it keeps all of them.
BROKEN = [
    ("auto_neb", "pivots", 0, 1),
    ("auto_neb", "between", 0, 1),
    ("auto_neb", "batch_size", 1, 2),
    ("auto_neb", "steps", -1, 0),
    ("auto_neb", "cycles", -1, 0),
    ("auto_neb", "curve_steps", -1, 0),
    ("auto_neb", "lr", 0.0, 1e-9),
    ("auto_neb", "lr", math.nan, 1.0),
    ("auto_neb", "tol", -1.0, 0.0),
    ("interpolation", "points", 60, 61),
    ("interpolation", "points", -3, 5),
    ("intrinsic_dim", "d", -1, 0),
    ("intrinsic_dim", "share", 0.0, 1.0),
    ("intrinsic_dim", "share", 1.1, 0.5),
    ("intrinsic_dim", "baseline", 90.0, 0.9),
    ("intrinsic_dim", "epochs", 0, 1),
    ("intrinsic_dim", "subspaces", 0, 1),
    ("intrinsic_dim", "batch_size", 0, 1),
    ("intrinsic_dim", "largest", 0, 1),
    ("intrinsic_dim", "lr", 0.0, 1.0),
    ("intrinsic_dim", "tolerance", -0.1, 0.0),
    ("lanczos", "k", 0, 1),
    ("lanczos", "k_min", -1, 0),
    ("lanczos", "tol", 0.0, 1e-9),
    ("lanczos", "max_products", 0, 1),
    ("lanczos", "density_probes", -1, 0),
    ("lanczos", "density_steps", 0, 1),
    ("layers", "depth", -1, 0),
    ("layers", "probes", 1, 2),
    ("layers", "k", 0, 1),
    ("perturbation", "points", 6, 7),
    ("perturbation", "points", 3, 5),
    ("perturbation", "rise", 0.0, 0.1),
    ("perturbation", "step", -1.0, 0.1),
    ("preconditioned", "k", 0, 1),
    ("preconditioned", "batch_size", -1, 0),
    ("sgd_noise", "k", 0, 1),
    ("sgd_noise", "probes", -1, 0),
    ("sharpness", "rho", 0.0, 0.1),
    ("sharpness", "adaptive_rho", -1.0, 0.1),
    ("sharpness", "sigma", math.inf, 0.1),
    ("sharpness", "adaptive_sigma", 0.0, 0.1),
    ("sharpness", "probes", 1, 2),
    ("sharpness", "starts", 0, 1),
    ("sharpness", "m", -1, 0),
    ("surface", "points", 6, 7),
    ("surface", "points", 3, 5),
    ("surface", "extent", 0.0, 0.1),
    ("symmetry_audit", "factor", 1.0, 1.5),
    ("symmetry_audit", "rho", 0.0, 0.1),
    ("symmetry_audit", "adaptive_rho", 0.0, 0.1),
    ("symmetry_audit", "probes", 1, 2),
]


@pytest.mark.parametrize(("probe", "option", "wrong", "right"), BROKEN)
def test_an_option_that_breaks_its_rule_is_named(probe, option, wrong, right):
    with pytest.raises(InputError, match=f"{option}={wrong!r} must be ") as caught:
        resolve(find(probe), {option: wrong}, "options")
    assert "\n" not in str(caught.value)
    assert resolve(find(probe), {option: right}, "options")[option] == right


def test_every_number_among_the_options_has_a_rule():
    own = [name for name, module in modules().items() if module.startswith("lsa.")]
    without = [
        f"{name}.{option.name}"
        for name in own
        for option in find(name).options.values()
        if option.type in (int, float) and not option.rules
    ]
    assert not without


@pytest.mark.parametrize("points", [6, 60, 62])
def test_points_off_the_grid_name_the_nearest(points):
    with pytest.raises(InputError) as caught:
        resolve(find("interpolation"), {"points": points}, "options")
    nearest = int(str(caught.value).split("nearest is ")[1].split(";")[0])
    assert nearest % 4 == 1 and abs(nearest - points) <= 2


def test_a_project_with_such_an_option_is_refused_when_it_is_read(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "dataset: {name: digits}\nmodel: {name: mlp}\noptimizers: {sgd: {name: SGD, lr: 0.1}}\n"
        "pairs: {interpolation: {points: 11}}\n"
    )
    with pytest.raises(InputError, match="interpolation's points=11 must be 4m"):
        load(str(file))

"""Which numbers move when the weights change and the function does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape, flatten, sam
from lsa.landscape.copies import duplicate
from lsa.landscape.derivatives import budget
from lsa.landscape.equivalents import equivalents
from lsa.landscape.float64 import in_float64
from lsa.landscape.samples import Samples
from lsa.landscape.symmetries import Change, function_change, rescaled, rescalings
from lsa.maths.alignment.permutations import (
    PermutationSpec,
    apply,
    permutation_spec,
    random_permutations,
)
from lsa.maths.planes import filter_normalised
from lsa.maths.spectra import counts, eigenpairs
from lsa.maths.spectra.trace import rademacher
from lsa.probe import (
    Metric,
    Report,
    Result,
    Sizes,
    Work,
    between,
    lanczos_rows,
    lanczos_vectors,
    probe,
    standard_error,
)
from lsa.runtime.errors import InputError

MOVED = 0.01  # relative change of a number that counts as one
DOUBLE = 2.5  # what float64 costs here, in that of float32 (2.6 on a CPU)
TRIED = 90  # rows of a basis that trying and changing one part of a transformer costs; as seen
EPS = 1e-8  # that torch's Adam adds to the root of its second moment
UNITS = {"weight_norm": "", "preconditioned_lambda_max": "1/η"}  # the others are in the loss's

Carry = Callable[[Tensor], Tensor]


class Variant(NamedTuple):
    """The network with other weights and the same function."""

    landscape: Landscape
    theta: Tensor
    carry: Carry  # a random vector for θ as the same one for these weights


class Measured(NamedTuple):
    """A number, with what each sample and each random vector adds to it."""

    value: float
    samples: Tensor | None = None  # (N,)
    probes: Tensor | None = None  # (probes,)


class Search(NamedTuple):
    """Start vectors, radii and options that every network is measured with."""

    start: Tensor
    signs: list[Tensor]
    normals: list[Tensor]
    rho: float
    adaptive_rho: float
    options: dict[str, Any]  # of `eigenpairs.lanczos`
    notes: list[str]


def _work(at: Sizes, *, probes: int, tol: float, **_: Any) -> Work:
    """Three Lanczos runs, two random means and some gradients on each of four networks.

    Of a transformer on five: its heads are rotated, too.
    """
    networks = 5 if at.symmetric else 4
    each = networks * DOUBLE * at.samples

    def of(search: float) -> Work:
        return Work(
            losses=4 * each,
            gradients=8 * each,
            products=3 * search * each,
            curvatures=(3 + 2 * probes) * each,
            rows=3 * networks * DOUBLE * lanczos_rows(search) + TRIED * at.symmetric,
            vectors=lanczos_vectors(search, at, 8) + 4 * probes + networks,
            width=8,
        )

    return between(of, counts.upper(1, tol, at.dimension))


@probe(headline=("lambda_max_rescaled_layers",), work=_work)
def symmetry_audit(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    factor: Annotated[
        float, "by which layers are scaled; a power of two rounds nothing", Field(gt=1)
    ] = 4.0,
    rho: Annotated[float, "radius of SAM's step, in the unit of θ", Field(gt=0)] = 0.05,
    adaptive_rho: Annotated[
        float, "radius of the adaptive step, relative to |θ|", Field(gt=0)
    ] = 0.5,
    probes: Annotated[
        int, "random vectors for the trace and the filter-normalised curvature", Field(ge=2)
    ] = 10,
    tol: Annotated[float, "residual allowed, relative to the eigenvalue", Field(gt=0)] = 1e-3,
    max_products: Annotated[
        int, "products per eigenvalue after which to stop unconverged", Field(ge=1)
    ] = 500,
) -> Result:
    """Which flatness measures move, and how far, when weights change but the function does not.

    Three changes keep every output as it is. rescaled_layers multiplies the incoming weights of a
    hidden layer by `factor` and divides its outgoing weights by it; every second layer is changed
    the other way round. rescaled_units takes a random factor between 1/`factor` and `factor` for
    each unit. permuted renumbers the units at random. Units are rescaled if their activation is
    positively homogeneous, as ReLU is (Dinh et al. 2017, arXiv 1703.04933); this is tried on the
    samples. With normalisation by fixed statistics, its scale and shift stand for the incoming
    weights. `function_change_…` is the largest change of an output, or of a sample's loss, over the
    largest: rounding.

    In a transformer, queries are rescaled against keys and values against the output layer, in each
    attention, or with random factors in each head. Heads, units and the residual stream are
    renumbered. rotated turns coordinates within each head at random.

    Each number is measured at the checkpoint (its plain name) and after each change; with the
    change's name behind it, it is the factor between: 1 did not move. Random vectors are the same
    ones throughout, renumbered with the units.

    lambda_max, trace, gradient_norm, weight_norm: of the Hessian, gradient and weights.
    sam_rise, adaptive_sam_rise: loss rise at SAM's and ASAM's step (Foret et al. 2021; Kwon et al.
    2021). adaptive_lambda_max: λ_max of |θ|H|θ|, relative to each weight. filter_curvature: mean of
    uᵀHu over random directions with the norm of each filter (Li et al. 2018).
    preconditioned_lambda_max: λ_max of P⁻¹H with P = √(1/N ∑ gᵢ²) + 10⁻⁸, the preconditioner at
    which Adam and RMSprop would rest here with batches of one sample; not that of the training.

    All in float64, so that what moves is no rounding. Standard errors of a factor are first-order
    and paired: the same samples and random vectors stand on both sides of it.
    """
    double = in_float64(landscape)
    original = Variant(double, theta.double(), lambda v: v)
    notes: list[str] = []
    d = len(theta)
    search = Search(
        start=torch.randn(d, generator=rng).to(original.theta),
        signs=[rademacher(d, rng, original.theta.dtype, theta.device) for _ in range(probes)],
        normals=[torch.randn(d, generator=rng).to(original.theta) for _ in range(probes)],
        rho=rho,
        adaptive_rho=adaptive_rho,
        options={"rng": rng, "tol": tol, "max_products": max_products},
        notes=notes,
    )
    base = _numbers(original, search)
    metrics = {name: _metric(name, number) for name, number in base.items()}
    findings: list[str] = []
    variants = dict(_variants(original, factor, rng, findings))
    for i, (change, variant) in enumerate(variants.items()):
        report(i + 1, 1 + len(variants), change.replace("_", " "))
        numbers = _numbers(variant, search)
        ratios = {name: _ratio(numbers[name], base[name]) for name in base if name in numbers}
        metrics |= {f"{name}_{change}": ratio for name, ratio in ratios.items()}
        difference = _function_change(original, variant)
        metrics[f"function_change_{change}"] = Metric(difference)
        findings.append(_verdict(change, {name: ratio.value for name, ratio in ratios.items()}))
    metrics["n_samples"] = Metric(landscape.n_samples)
    return Result(metrics, converged=not notes, notes=(*findings, *dict.fromkeys(notes)))


def _function_change(original: Variant, variant: Variant) -> float:
    """Largest change of an output, or of a loss where the data are batches."""
    if isinstance(original.landscape.data, Samples):
        return function_change(original.landscape, original.theta, variant.landscape, variant.theta)
    before, after = (landscape.losses(theta) for landscape, theta, _ in (original, variant))
    return ((before - after).abs().max() / before.abs().max()).item()


# --- the changes ---------------------------------------------------------------------------------


def _variants(
    original: Variant, factor: float, rng: torch.Generator, findings: list[str]
) -> Iterator[tuple[str, Variant]]:
    """Name of each change and the network after it; `findings` get what cannot be changed."""
    landscape, theta, _ = original
    try:
        spec = permutation_spec(landscape.model)
    except InputError as refused:
        try:
            made, parts = equivalents(landscape, theta, factor, rng)
        except InputError as error:
            findings.append(f"no symmetry of this network is known: {refused}; {error}")
            return
        findings.append(f"parts that can be rescaled: {parts or 'none'}")
        for name, other, carry in made:
            yield name, Variant(landscape, other, carry)
        return
    changes = rescalings(landscape, theta, spec)
    if changes:
        findings.append("layers that can be rescaled: " + ", ".join(changes))
        for name, factors in _factors(spec, changes, factor, rng).items():
            scaled = rescaled(landscape, theta, changes, factors)
            yield name, Variant(landscape, scaled, lambda v: v)
    else:
        findings.append(
            "no layer can be rescaled: none has a positively homogeneous activation, such as ReLU, "
            "between weights that are trained"
        )
    if frozen := _frozen(landscape, spec):
        findings.append(
            f"no units can be renumbered: {frozen} is frozen, so its units keep their order"
        )
    elif spec.sizes:
        yield "permuted", _permuted(original, spec, rng)
    else:
        findings.append("no units can be renumbered: there is no hidden layer")


def _factors(
    spec: PermutationSpec, changes: dict[str, Change], factor: float, rng: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """Change → group → factors of its units.

    Every second layer is divided: of two neighbours with one factor the weights between would stay.
    """
    layers, units = {}, {}
    for i, group in enumerate(changes):
        n = spec.sizes[group]
        layers[group] = torch.full((n,), factor if i % 2 == 0 else 1 / factor).double()
        units[group] = factor ** (2 * torch.rand(n, generator=rng).double() - 1)
    return {"rescaled_layers": layers, "rescaled_units": units}


def _frozen(landscape: Landscape, spec: PermutationSpec) -> str | None:
    """A parameter that would have to be renumbered too, but is no part of θ."""
    trainable = landscape.unflatten(torch.empty(landscape.dimension)).keys()
    return next((n for n in spec.axes if n not in spec.buffers and n not in trainable), None)


def _permuted(original: Variant, spec: PermutationSpec, rng: torch.Generator) -> Variant:
    landscape, theta, _ = original
    orders = random_permutations(spec, rng)
    model = duplicate(landscape.model)
    tensors = {**model.state_dict(), **landscape.unflatten(theta)}
    model.load_state_dict(apply(spec, orders, tensors))

    def carry(v: Tensor) -> Tensor:
        moved = apply(spec, orders, landscape.unflatten(v))
        return torch.cat([tensor.reshape(-1) for tensor in moved.values()])

    return Variant(landscape.with_model(model), flatten(model), carry)


# --- the numbers ---------------------------------------------------------------------------------


def _numbers(variant: Variant, search: Search) -> dict[str, Measured]:
    """Every number of one network; SAM's steps are left out where the gradient is 0."""
    landscape, theta, carry = variant
    ones = torch.ones_like(theta)
    gradient = landscape.gradient(theta)
    steepness = gradient.norm()
    numbers = {
        "lambda_max": _top(variant, ones, search),
        "trace": _mean_curvature(landscape, theta, [carry(v) for v in search.signs]),
        "gradient_norm": Measured(steepness.item()),
        "weight_norm": Measured(theta.norm().item()),
        "adaptive_lambda_max": _top(variant, theta.abs(), search),
        "filter_curvature": _mean_curvature(
            landscape,
            theta,
            [filter_normalised(landscape.unflatten(theta), carry(v)) for v in search.normals],
        ),
        "preconditioned_lambda_max": _top(variant, _root(landscape, theta).rsqrt(), search),
    }
    if steepness > 0:
        slopes = landscape.influences(landscape.slopes(theta, gradient / steepness))
        numbers["gradient_norm"] = Measured(steepness.item(), slopes)
        for name, scale, radius in (
            ("sam_rise", ones, search.rho),
            ("adaptive_sam_rise", theta.abs(), search.adaptive_rho),
        ):
            if (step := sam.ascent(scale * gradient, radius)) is not None:
                rises = landscape.influences(
                    landscape.losses(theta + scale * step) - landscape.losses(theta)
                )
                turned = sam.turning(landscape, theta, scale, radius, step)
                numbers[name] = Measured(rises.mean().item(), rises + turned)
    return numbers


def _top(variant: Variant, scale: Tensor, search: Search) -> Measured:
    """λ_max of S H S, S = diag(scale)."""
    landscape, theta, carry = variant
    hessian = landscape.hessian(theta)
    extremes = eigenpairs.lanczos(
        lambda v: scale * hessian(scale * v),
        carry(search.start),
        largest=1,
        smallest=0,
        basis=budget.basis(theta, 1),
        **search.options,
    )
    search.notes.extend(extremes.shortfall("an eigenvalue"))
    v = scale * extremes.largest.vectors[:, 0]
    return Measured(
        extremes.largest.values[0].item(), landscape.influences(landscape.curvatures(theta, v))
    )


def _mean_curvature(landscape: Landscape, theta: Tensor, directions: list[Tensor]) -> Measured:
    """Mean of vᵀHv over the directions."""
    table = torch.stack([landscape.influences(landscape.curvatures(theta, v)) for v in directions])
    return Measured(table.mean().item(), table.mean(0), table.mean(1))


def _root(landscape: Landscape, theta: Tensor) -> Tensor:
    """√(1/N ∑ gᵢ²) + ε, `(d,)`."""
    total = torch.zeros_like(theta)
    for block in landscape.sample_gradients(theta):
        total += block.square().sum(0)
    return (total / landscape.n_samples).sqrt() + EPS


def _metric(name: str, number: Measured) -> Metric:
    return Metric(number.value, UNITS.get(name, "loss"), _errors(number.samples, number.probes))


def _ratio(after: Measured, before: Measured) -> Metric:
    """The number after a change over that before, with the paired error."""
    if not before.value:
        return Metric(float("nan"))
    ratio = after.value / before.value

    def influences(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else (a - ratio * b) / before.value

    errors = _errors(
        influences(after.samples, before.samples), influences(after.probes, before.probes)
    )
    return Metric(ratio, "", errors)


def _errors(samples: Tensor | None, probes: Tensor | None) -> dict[str, float]:
    data = {} if samples is None else standard_error(samples)
    return data if probes is None else data | standard_error(probes, "probes")


def _verdict(change: str, ratios: dict[str, float]) -> str:
    """One sentence: what moved by what factor, and what did not."""
    moved = {name: ratio for name, ratio in ratios.items() if not abs(ratio - 1) <= MOVED}
    still = [name for name in ratios if name not in moved]
    text = f"{change.replace('_', ' ')}, the function is the same"
    if moved:
        text += ", and moves " + ", ".join(f"{name} ×{ratio:.3g}" for name, ratio in moved.items())
    if still:
        text += f"; {'unmoved are' if moved else 'nothing moves:'} {', '.join(still)}"
    return text

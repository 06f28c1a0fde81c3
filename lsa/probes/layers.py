"""Curvature and gradient noise of each layer by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape, flatten
from lsa.landscape.blocks import Slice, SlicedProduct, blocks, owners, parted
from lsa.landscape.derivatives import budget
from lsa.maths.spectra import counts, eigenpairs
from lsa.maths.spectra.trace import rademacher
from lsa.probe import (
    Curve,
    Metric,
    Report,
    Result,
    Same,
    Sizes,
    Work,
    between,
    lanczos_rows,
    lanczos_vectors,
    probe,
    standard_error,
)
from lsa.runtime.errors import InputError

PART = 0.25  # of a product with H, what one of a block costs on average beside its forward pass


class Block(NamedTuple):
    """Ends of the spectrum of a block, and what each sample adds to its upper end."""

    ends: eigenpairs.Extremes
    curvatures: Tensor  # (N,) of each sample along the top eigenvector

    @property
    def top(self) -> float:
        """λ_max."""
        return self.ends.largest.values[0].item()

    @property
    def bottom(self) -> float:
        """λ_min; of a single parameter it is λ_max."""
        return torch.cat([self.ends.largest.values, self.ends.smallest.values])[-1].item()


class Search(NamedTuple):
    """Options of the search for the ends of every block."""

    rng: torch.Generator
    tol: float
    max_products: int
    report: Report

    def block(
        self,
        landscape: Landscape,
        theta: Tensor,
        name: str,
        ends: tuple[int, int],
        entries: Tensor | None = None,
    ) -> Block:
        """Eigenpairs at both ends of a block's Hessian.

        Args:
            landscape: As a function of the block's parameters, or of all.
            theta: Their θ.
            name: Of the block, for notes.
            ends: Numbers of largest and of smallest eigenvalues.
            entries: Indices of the block's coordinates in θ; all by default.
        """
        largest, smallest = ends
        product = landscape.hessian(theta)
        sliced = None if entries is None else SlicedProduct(product, theta, entries)
        extremes = eigenpairs.lanczos(
            sliced or product,
            eigenpairs.start_vector(theta if entries is None else theta[entries], self.rng),
            rng=self.rng,
            largest=largest,
            smallest=smallest,
            tol=self.tol,
            max_products=self.max_products,
            basis=budget.basis(theta, largest + smallest),
            random=1.0,
            report=lambda done, total, text: self.report(done, total, f"{name}: {text}"),
        )
        top = extremes.largest.vectors[:, 0]
        curvatures = landscape.curvatures(theta, sliced.spread(top) if sliced else top)
        return Block(extremes, landscape.influences(curvatures).double())


def _work(
    at: Sizes, *, depth: int, fused: str, lower: str, tol: float, k: int, probes: int, **_: Any
) -> Work:
    """A Lanczos run per block and one on the whole.

    A product with the first layer's block costs half of one with H, with the last's next to
    nothing; without graphs that are kept, each makes a forward pass.
    """
    n = max(1, len(blocks(at.parameters, depth)))
    n += at.apart if fused == "apart" and not depth else 0
    size = max(1, at.dimension // n)
    of_block = counts.both(1, int(lower == "yes"), tol, size, near=False)
    of_whole = counts.upper(k, tol, at.dimension)

    def of(searches: tuple[float, float]) -> Work:
        each, whole = searches
        return Work(
            losses=n * (1 if at.kept else each + 1) * at.samples,
            gradients=3.0 * at.samples,
            products=(n * each * PART + whole + probes) * at.samples,
            curvatures=(n * PART + 1) * at.samples,
            rows=lanczos_rows(each) + lanczos_rows(whole),  # blocks together are as long as θ
            vectors=lanczos_vectors(whole, at) + 3 * k,
        )

    return between(of, list(zip(of_block, of_whole, strict=True)))


@probe(
    headline=("block_lambda_max", "block_share"),
    work=_work,
    compare=("block_lambda_max", "block_share"),
    check=(
        Same("λ_max", "lambda_max", "lanczos/lambda_max", within=0.01),
        Same("tr H", "trace", "lanczos/trace"),
    ),
    caption="Largest eigenvalue of the Hessian of each layer alone, from the first to the last: "
    "see where the network is sharp. Layers act together too: λ_max of the whole is "
    "larger. Rescaling two layers against each other moves sharpness from one to the "
    "other.",
)
def layers(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    depth: Annotated[int, "parts of a name that make a block; 0: each layer", Field(ge=0)] = 0,
    fused: Annotated[
        Literal["apart", "whole"],
        "queries, keys and values of one fused layer as blocks of their own, or as one",
    ] = "apart",
    lower: Annotated[Literal["yes", "no"], "the lower end of every block as well"] = "yes",
    tol: Annotated[float, "residual allowed, relative to the eigenvalue", Field(gt=0)] = 1e-2,
    max_products: Annotated[int, "products that end a block's search", Field(ge=1)] = 300,
    probes: Annotated[int, "random vectors for the traces, shared by all blocks", Field(ge=2)] = 20,
    k: Annotated[int, "eigenvectors of H whose part of the traces is exact", Field(ge=1)] = 8,
) -> Result:
    """Curvature and gradient noise per layer: λ_max, λ_min, trace and share of tr C of each block.

    A block is a layer (its weight and bias), or all layers whose modules' names begin with the
    same `depth` parts: for `stage1.0.conv`, depth 1 groups by `stage1`. Its Hessian is the diagonal
    block H_bb of H = ∇²L. `block_lambda_max` is the largest λ_max(H_bb), `block_share` its ratio to
    λ_max(H): at most 1 by interlacing, and 1 if the sharpest direction lies within one block.

    If one layer makes queries, keys and values of attention, each is a block, named `….query` and
    so on. This needs `depth` 0 and heads that are recognised.

    The ends come from Lanczos on each block, to a residual of `tol`, which changes an eigenvalue by
    its square. An end below 1 % of the block's largest |λ| is known only to `tol` times that.

    Traces: for random signs v, v_bᵀ(Hv)_b has the mean tr H_bb (Hutchinson's estimator, which
    PyHessian uses for whole networks, Yao et al. 2020), so one product serves all blocks. The part
    of the `k` top eigenvectors of H is taken out and added exactly: with as many as there are
    classes the errors are several times smaller (tuned here). tr C of a block is exact on these
    samples, from the per-sample gradients.

    Standard errors over the data are those of per-sample curvatures vᵀ∇²ℓᵢv along the eigenvector
    (first-order perturbation theory) and of per-sample squared gradients; of traces, over the
    random vectors.
    """
    _check(k, landscape.dimension)
    of_layers = blocks(landscape.unflatten(theta), depth)
    named = {name: Slice(members) for name, members in of_layers.items()}
    if fused == "apart":
        named = parted(landscape, theta, of_layers)
    search = Search(rng, tol, max_products, report)
    network = search.block(landscape, theta, "whole network", (k, 0))
    parts = []
    for name, piece in named.items():
        part = landscape.restricted(theta, piece.names)
        at = flatten(part.model)
        n = len(at) if piece.entries is None else len(piece.entries)
        wanted = 1, int(lower == "yes" and n > 1)
        parts.append(search.block(part, at, name, wanted, piece.entries))
    notes, near_zero = _doubts([("whole network", network), *zip(named, parts, strict=True)])
    converged = not notes
    notes.append("blocks from 1 on: " + ", ".join(named))
    if near_zero:
        notes.append("not told from zero by its residual: λ_min of " + ", ".join(near_zero))
    of = owners(landscape, theta, named)
    metrics = _ends(network, parts) | {"n_samples": Metric(landscape.n_samples)}
    index = np.arange(1.0, len(named) + 1)
    curves = _end_curves(index, parts, lower == "yes")
    traces = _traces(landscape, theta, network.ends.largest, of, len(named), rng, probes, report)
    metrics["trace"] = _mean(traces.sum(1), "loss", "probes")
    curves["trace_of_block"] = _curve(index, traces, "loss")
    if landscape.has_samples:
        squares = _squares(landscape, theta, of, len(named))
        metrics["trace_c"] = _mean(squares.sum(1), "loss²", "data")
        curves |= _noise(index, squares)
    else:
        notes.append("the gradient noise is left out: the objective gives no losses of samples")
    arrays = {
        "blocks.names": np.array(list(named)),
        "blocks.lambda_max": curves["lambda_max_of_block"].y,
        "blocks.lambda_max_limit": np.array([part.ends.limit for part in parts]),
        "blocks.trace": curves["trace_of_block"].y,
        "blocks.sizes": of.bincount(minlength=len(named)).cpu().numpy(),
    }
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _doubts(searched: Iterable[tuple[str, Block]]) -> tuple[list[str], list[str]]:
    """Notes on blocks that have not converged, and the blocks whose λ_min may be zero."""
    notes, near_zero = [], []
    for name, block in searched:
        if not block.ends.settled:
            notes += block.ends.shortfall(name)
        elif not block.ends.converged:
            near_zero.append(name)
    return notes, near_zero


def _ends(network: Block, parts: list[Block]) -> dict[str, Metric]:
    """λ_max of the whole network and of the sharpest block."""
    sharpest = max(parts, key=lambda block: block.top)
    return {
        "lambda_max": Metric(network.top, "loss", standard_error(network.curvatures)),
        "block_lambda_max": Metric(sharpest.top, "loss", standard_error(sharpest.curvatures)),
        "block_share": _ratio(sharpest, network),
        "n_blocks": Metric(len(parts)),
        "products": Metric(sum(block.ends.products for block in (network, *parts))),
    }


def _end_curves(index: np.ndarray, parts: list[Block], lower: bool) -> dict[str, Curve]:
    """λ_max of every block with its error, and λ_min where it was searched."""
    top = np.array([block.top for block in parts])
    error = np.array([standard_error(block.curvatures).get("data", np.nan) for block in parts])
    curves = {"lambda_max_of_block": Curve(index, top, "block", error, y_unit="loss")}
    if lower:
        bottom = np.array([block.bottom for block in parts])
        curves["lambda_min_of_block"] = Curve(index, bottom, "block", y_unit="loss")
    return curves


def _noise(index: np.ndarray, squares: Tensor) -> dict[str, Curve]:
    """tr C of every block, and its share, from |gᵢ − g|² `(N, blocks)`."""
    curves = {"noise_of_block": _curve(index, squares, "loss²")}
    if (total := squares.sum(1).mean()) > 0:
        share = squares.mean(0) / total
        # To first order a sample moves the ratio by its deviation from it.
        influences = share + (squares - share * squares.sum(1, keepdim=True)) / total
        curves["noise_share_of_block"] = _curve(index, influences, "")
    return curves


def _check(k: int, dimension: int) -> None:
    if k > dimension:
        raise InputError(f"k={k}: choose 1 to d={dimension} eigenvectors of the whole")


def _traces(
    landscape: Landscape,
    theta: Tensor,
    known: eigenpairs.Eigenpairs,
    of: Tensor,
    n: int,
    rng: torch.Generator,
    probes: int,
    report: Report,
) -> Tensor:
    """An unbiased estimate of every block's trace by each random v, `(probes, n)`.

    H = UΛUᵀ + rest with the known pairs: their diagonal is exact, v ∘ (rest v) has the other's
    mean. That holds for any U and Λ, so nothing rests on the pairs' accuracy.
    """
    hessian, estimates = landscape.hessian(theta), []
    U, values = known.vectors.double(), known.values.to(theta.device)
    exact = U.square() @ values
    for i in range(probes):
        v = rademacher(len(theta), rng, theta.dtype, theta.device)
        rest = hessian(v).double() - U @ (values * (U.T @ v.double()))
        estimates.append(exact.new_zeros(n).index_add_(0, of, exact + v.double() * rest))
        report(i + 1, probes, "traces of the blocks")
    return torch.stack(estimates)


def _squares(landscape: Landscape, theta: Tensor, of: Tensor, n: int) -> Tensor:
    """|gᵢ − g|² of every sample and block, `(N, n)`; their means are tr C of the blocks."""
    g, parts = landscape.gradient(theta).double(), []
    for rows in landscape.sample_gradients(theta):
        squares = (rows.double() - g).square()
        parts.append(squares.new_zeros(len(rows), n).index_add_(1, of, squares))
    return torch.cat(parts)


def _mean(values: Tensor, unit: str, source: str) -> Metric:
    return Metric(values.mean().item(), unit, standard_error(values, source))


def _ratio(sharpest: Block, network: Block) -> Metric:
    """λ_max of a block over that of the whole, its error to first order."""
    if not network.top > 0:
        return Metric(float("nan"))
    share = sharpest.top / network.top
    return Metric(
        share, "", standard_error((sharpest.curvatures - share * network.curvatures) / network.top)
    )


def _curve(index: np.ndarray, values: Tensor, unit: str) -> Curve:
    """Mean of every column and its standard error over the rows."""
    n = len(values)
    error = (values.std(0) / n**0.5).cpu().numpy() if n > 1 else None
    return Curve(index, values.mean(0).cpu().numpy(), "block", error, y_unit=unit)

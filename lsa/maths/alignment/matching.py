"""Align two transformers: the move of one along its symmetries that brings its weights nearest.

Gains of norms and the scale of queries against keys, of values against the output layer, are free
as well, so that the distance of weights means little as they are. Both networks are therefore
written with gains of one and *balanced* heads (queries as large as keys in every direction). In
that form the free moves are orthogonal, and are found part by part, each at its optimum with the
others held, as weight matching does for permutations (Ainsworth et al. 2023; Theus et al. 2025).
The result has A's own gains and A's own balance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsa.maths.alignment.balance import balance, coordinates, inverse
from lsa.maths.alignment.parameters import check_pair
from lsa.maths.alignment.procrustes import HeadCorrelations, nearest, nearest_heads
from lsa.maths.alignment.symmetries import (
    HeadMove,
    Heads,
    Move,
    Space,
    Symmetries,
    TensorAxis,
    Tensors,
    apply,
    gains,
    unmoved,
    with_gains,
)

LEAST_GAIN = 1e-3  # of a norm, relative to its largest, that layers may be divided by
ROUGH = 1e-3  # difference of an entry of a move that makes it another


@dataclass(frozen=True)
class Aligned:
    """B moved along its symmetries, with its function."""

    tensors: Tensors
    similarity: float  # inner product of both networks with gains of one and balanced heads
    converged: bool  # no part can be improved by itself
    moved: float  # fraction of the coordinates that are not what they were


def aligned(
    symmetries: Symmetries,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    rng: torch.Generator,
    *,
    restarts: int = 3,
    max_passes: int = 100,
) -> Aligned:
    """B with the same function and its weights near A's.

    The first run starts from B as it is, the others from one pass that counts only weights whose
    other axis is fixed or matched already: embeddings first, whose tokens have one order.

    Args:
        symmetries: Of both networks.
        a: Parameters of A by name.
        b: Parameters of B by name.
        rng: Source of the orders in which parts are visited.
        restarts: Number of runs, at least 1 (tuned here).
        max_passes: Limit of passes over all parts in each run.

    Raises:
        InputError: A parameter is missing, has another shape or is not finite.
    """
    check_pair(symmetries.names, a, b)
    symmetries = usable(symmetries, a, b)
    names = [n for n in b if n in {*symmetries.names, *gains(symmetries, a)}]
    own, other = ({n: t[n].detach().double().cpu() for n in names} for t in (a, b))
    own_gains = gains(symmetries, own)
    own, other = (with_gains(symmetries, t, None) for t in (own, other))
    scales: list[dict[str, HeadMove]] = [{}, {}]
    for part in symmetries.heads:
        moves = [balance(part, t) for t in (own, other)]
        for scale, move in zip(scales, moves, strict=True):
            if move is not None and None not in moves:
                scale[part.name] = move
    balanced = [h for h in symmetries.heads if h.name in scales[0]]
    own, other = (apply(balanced, s, t) for s, t in zip(scales, (own, other), strict=True))
    problem = _Problem(symmetries, own, other)
    runs = [problem.run(rng, max_passes, anchored=i > 0) for i in range(max(1, restarts))]
    similarities = [problem.similarity(moves) for moves, _ in runs]
    similarity = max(similarities)
    best, converged = runs[similarities.index(similarity)]
    problem.polish(best, max_passes)
    moved = apply(symmetries.parts.values(), best, other)
    back = {name: inverse(move) for name, move in scales[0].items()}
    moved = with_gains(symmetries, apply(balanced, back, moved), own_gains)
    tensors = {name: moved[name].to(t) if name in moved else t for name, t in b.items()}
    moves = {name: (part, best[name]) for name, part in symmetries.parts.items()}
    return Aligned(
        tensors=tensors,
        similarity=similarity,
        converged=converged,
        moved=_displaced(moves.values()),
    )


def usable(symmetries: Symmetries, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Symmetries:
    """The symmetries that remain where some gains are too near 0 to divide by.

    A gain smaller than `LEAST_GAIN` times its norm's largest, in either network, is not put into
    the layers behind it. Then the coordinates of its stream can no longer be rotated: they keep
    their order and, where the stream's mean is taken out, their signs as freedom.

    Args:
        symmetries: Of both networks.
        a: Parameters of A by name; the gains of its norms, `(n,)`, are read.
        b: Parameters of B by name.
    """

    def safe(norm: str) -> bool:
        return all(t[norm].abs().min() > LEAST_GAIN * t[norm].abs().max() for t in (a, b))

    spaces = []
    for space in symmetries.spaces:
        norms = tuple(replace(n, folds=n.folds and safe(n.weight)) for n in space.norms)
        freedom = space.freedom
        if not all(n.folds for n in norms):
            freedom = {"orthogonal": "signed", "centred": "permutation"}.get(freedom, freedom)
        spaces.append(replace(space, norms=norms, freedom=freedom))
    return replace(symmetries, spaces=tuple(spaces))


def _displaced(moves: Iterable[tuple[Space | Heads, Move]]) -> float:
    """Fraction of the coordinates of spaces, and of the groups of heads, that a move changes."""
    changed = total = 0
    for part, move in moves:
        gaps = _gaps(move, unmoved(part))
        some = torch.stack([gap.reshape(len(gap), -1).amax(1) > ROUGH for gap in gaps]).any(0)
        changed, total = changed + int(some.sum()), total + len(some)
    return changed / max(1, total)


def _gaps(a: Move, b: Move) -> list[Tensor]:
    """Absolute differences between two moves of a part, entry by entry."""
    first, second = ([m] if isinstance(m, Tensor) else list(m) for m in (a, b))
    return [(x - y).abs() for x, y in zip(first, second, strict=True)]


def _distance(a: Move, b: Move) -> float:
    """Largest difference of an entry."""
    return max((gap.max().item() for gap in _gaps(a, b) if gap.numel()), default=0.0)


class _Problem:
    """⟨a, moves(b)⟩ as a function of the moves."""

    def __init__(self, symmetries: Symmetries, a: Tensors, b: Tensors) -> None:
        self.parts = symmetries.parts
        self.a, self.b = {n: a[n] for n in symmetries.names}, {n: b[n] for n in symmetries.names}
        self.touched = {
            name: list(dict.fromkeys(p.name for p in _axes(part)))
            for name, part in self.parts.items()
        }
        self.least_gain = 1e-12 * sum((a[n].norm() * b[n].norm()).item() for n in self.a)

    def similarity(self, moves: Mapping[str, Move]) -> float:
        """⟨a, moves(b)⟩."""
        return self.inner(apply(self.parts.values(), moves, self.b))

    def inner(self, moved: Mapping[str, Tensor]) -> float:
        return sum((self.a[name] * t).sum().item() for name, t in moved.items())

    def run(
        self, rng: torch.Generator, max_passes: int, *, anchored: bool
    ) -> tuple[dict[str, Move], bool]:
        """Moves that no part improves by itself, and whether they were reached."""
        moves = {name: unmoved(part) for name, part in self.parts.items()}
        if anchored:
            self.anchor(moves, rng)
        for _ in range(max_passes):
            improved = [self.improve(name, moves) for name in _shuffled(list(moves), rng)]
            if not any(improved):
                return moves, True
        return moves, False

    def anchor(self, moves: dict[str, Move], rng: torch.Generator) -> None:
        """Each part once, those first that have a weight whose other axis is settled."""
        settled, waiting = set[str](), _shuffled(list(moves), rng)
        while waiting:
            name = next((n for n in waiting if self.anchored(n, settled)), waiting[0])
            others = self.others(name, moves)
            moves[name] = self.best(name, self.counted(name, settled), others)
            settled.add(name)
            waiting.remove(name)

    def counted(self, name: str, settled: Set[str]) -> list[str]:
        """Tensors of a part whose other parts are settled."""
        unsettled = [n for part, n in self.touched.items() if part not in settled | {name}]
        away = {n for names in unsettled for n in names}
        return [n for n in self.touched[name] if n not in away]

    def anchored(self, name: str, settled: Set[str]) -> bool:
        return any(self.a[n].ndim > 1 for n in self.counted(name, settled))

    def others(self, name: str, moves: Mapping[str, Move]) -> Tensors:
        """B's tensors of one part with all other parts moved."""
        parts = [part for other, part in self.parts.items() if other != name]
        return apply(parts, moves, {n: self.b[n] for n in self.touched[name]})

    def improve(self, name: str, moves: dict[str, Move]) -> bool:
        """Replace the move of a part by its best one, if that gains."""
        others, part = self.others(name, moves), self.parts[name]
        proposal = self.best(name, self.touched[name], others)
        before, after = (
            self.inner(apply([part], {name: move}, others)) for move in (moves[name], proposal)
        )
        if after > before + self.least_gain:
            moves[name] = proposal
            return True
        return False

    def polish(self, moves: dict[str, Move], max_passes: int) -> None:
        """Bring rotations to rounding: a gain is of second order, and is lost in it long before."""
        last = float("inf")
        for _ in range(max_passes):
            change = 0.0
            for name in moves:
                new = self.best(name, self.touched[name], self.others(name, moves))
                step = _distance(new, moves[name])
                if step < ROUGH:  # another order would be another optimum
                    moves[name], change = new, max(change, step)
            if not change < 0.9 * last:
                return
            last = change

    def best(self, name: str, counted: list[str], others: Tensors) -> Move:
        """The best move of one part, by the tensors that count."""
        part = self.parts[name]
        if isinstance(part, Heads):
            return nearest_heads(part, self.head_correlations(part, set(counted), others))
        signed, unsigned = torch.zeros(2, part.size, part.size, dtype=torch.float64)
        for axes, total in ((part.axes, signed), (part.magnitudes, unsigned)):
            for p in axes:
                if p.name in counted:
                    total += p.rows(self.a[p.name]) @ p.rows(others[p.name]).T
        return nearest(part.freedom, signed, unsigned)

    def head_correlations(self, heads: Heads, counted: Set[str], b: Tensors) -> HeadCorrelations:
        groups, r, m, n = heads.shape
        zero = torch.zeros(groups, groups, r, r, 1, 1, dtype=torch.float64)

        def each(axes: tuple[TensorAxis, ...], pattern: str, start: Tensor) -> Tensor:
            chosen = [p for p in axes if p.name in counted]
            if not chosen:
                return start
            x, y = coordinates(chosen, self.a), coordinates(chosen, b)
            return torch.einsum(pattern, x, y)

        inner, outer = "gimx,hjnx->ghijmn", "gmx,hnx->ghmn"
        return HeadCorrelations(
            each(heads.query, inner, zero.expand(-1, -1, -1, -1, m, m)),
            each(heads.key, outer, zero[:, :, 0, 0].expand(-1, -1, m, m)),
            each(heads.value, outer, zero[:, :, 0, 0].expand(-1, -1, n, n)),
            each(heads.out, inner, zero.expand(-1, -1, -1, -1, n, n)),
        )


def _axes(part: Space | Heads) -> tuple[TensorAxis, ...]:
    return part.axes if isinstance(part, Heads) else (*part.axes, *part.magnitudes)


def _shuffled(names: list[str], rng: torch.Generator) -> list[str]:
    return [names[i] for i in torch.randperm(len(names), generator=rng, device=rng.device)]

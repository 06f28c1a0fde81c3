"""Noise of the gradient during a training, from the probe set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lsa.landscape import Landscape, noise_scale
from lsa.runtime.errors import InputError

AGREEMENT = 1e-3  # relative, of |∇L|² from the products of samples with that of autograd
SHOWN = (  # of each block
    "noise_scale",
    "noise_scale_low",
    "noise_scale_high",
    "noise_trace",
    "gradient_squared",
)

Span = tuple[int, int]  # start and end of a parameter in θ


class Noise:
    """Noise scale and diversity of the gradient on the probe set.

    From all pairs of per-sample gradients where one pass gives their products, as in a perceptron;
    else from the gradients of equal parts of the set.

    Args:
        spans: Block → spans of its parameters in θ; empty: only the whole gradient is measured.
    """

    def __init__(self, spans: Mapping[str, Sequence[Span]]) -> None:
        self._spans = spans
        self._by_samples: bool | None = None  # whether products of samples are known; None: untried

    def measure(
        self, landscape: Landscape, parts: Sequence[Landscape], theta: Tensor
    ) -> dict[str, float]:
        """Numbers; none where there are parts of different size.

        Args:
            landscape: L on the probe set.
            parts: L on parts of it.
            theta: Where.

        Raises:
            InputError: One sample, or fewer than three parts.
        """
        if landscape.n_samples < 2:
            raise InputError("batches= hold one sample, which has no noise; give two or more")
        grams = self._of_samples(landscape, theta)
        size, n = 1, landscape.n_samples
        if grams is None:
            sizes = {part.n_samples for part in parts}
            if len(parts) < 3:
                raise InputError(
                    f"batches= are {len(parts)} to the network, whose noise takes three or more; "
                    "give more samples"
                )
            if len(sizes) != 1:
                return {}
            size = sizes.pop()
            n = len(parts) * size
            gradients = torch.stack([part.gradient(theta) for part in parts])
            if not self._spans:
                grams = {(0, len(theta)): noise_scale.gram(gradients)}
            else:
                spans = [span for block in self._spans.values() for span in block]
                grams = {(a, b): noise_scale.gram(gradients[:, a:b]) for a, b in spans}
        held = {span: gram.double().cpu() for span, gram in grams.items()}
        measured = noise_scale.of_gram(sum_of(list(held.values())), size, n).numbers()
        for block, spans in self._spans.items():
            own = [gram for span, gram in held.items() if span in spans]
            numbers = noise_scale.of_gram(sum_of(own), size, n).numbers() if own else {}
            measured |= {f"{name}/{block}": numbers[name] for name in SHOWN if name in numbers}
        return measured

    def _of_samples(self, landscape: Landscape, theta: Tensor) -> dict[Span, Tensor] | None:
        """Products of per-sample gradients, if they are known; the first time they are checked."""
        if self._by_samples is False:
            return None
        grams = noise_scale.sample_grams(landscape, theta)
        if self._by_samples is None:
            self._by_samples = grams is not None and _agrees(grams, landscape.gradient(theta))
        return grams if self._by_samples else None


def sum_of(grams: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors of equal shape."""
    return torch.stack(list(grams)).sum(0)


def _agrees(grams: Mapping[Span, Tensor], gradient: Tensor) -> bool:
    """Whether the mean of the products of samples is |∇L|², part by part."""
    for (start, stop), gram in grams.items():
        wanted = float(gradient[start:stop].double().square().sum())
        scale = float(gram.diagonal().double().mean())
        if abs(float(gram.double().mean()) - wanted) > AGREEMENT * scale:
            return False
    return True

"""`python -m benchmarks.layer_map`: curvature of every block of a GPT, by depth and kind of layer.

Prints what the run took, in gradients and in products with the whole Hessian.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import gpt
from lsa.figures.layers import draw
from lsa.landscape import Landscape, objectives
from lsa.probes.layers import layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=gpt.SHAPES, default="0.8M")
    parser.add_argument("--steps", type=int, default=100, help="of AdamW on this source")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--lower", choices=("yes", "no"), default="no", help="also lower ends")
    parser.add_argument("--figure", type=Path, default=Path("layer-map.png"))
    options = parser.parse_args()
    shape = gpt.SHAPES[options.size]
    model = gpt.trained(shape, options.steps)
    ids = gpt.text(options.sequences, options.context, shape.vocabulary, seed=7)
    at = Landscape(model, [ids], objective=objectives.per_token())
    theta, rng = at.theta, torch.Generator().manual_seed(0)
    product, v = at.hessian(theta), torch.randn(at.dimension, generator=rng)
    gradient, once = seconds(lambda: at.gradient(theta)), seconds(lambda: product(v))
    start = time.process_time()
    result = layers(at, theta, rng, lambda *_: None, k=1, probes=10, lower=options.lower, tol=0.03)
    took = time.process_time() - start
    print(
        f"{at.dimension} parameters, {int(result.metrics['n_blocks'].value)} blocks, "
        f"{int(result.metrics['products'].value)} products in {took:.1f} s of CPU time: "
        f"{took / gradient:.0f} gradients, or {took / once:.0f} products with H"
    )
    draw(result, f"GPT of {options.size} parameters").savefig(options.figure)


def seconds(call: object) -> float:
    """CPU time of a call, the least of three after one."""
    assert callable(call)
    call()
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()

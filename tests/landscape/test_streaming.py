"""Data that are never all in memory."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape

BATCH, WIDTH = 500, 400
Work = Callable[[Landscape, Tensor], None]


class Stream:
    """Batches made when they are read; their number is known to nobody else."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, self._samples, BATCH):
            x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(i))
            yield x, torch.arange(BATCH) % 3


def two_products(landscape: Landscape, theta: Tensor) -> None:
    product = landscape.hessian(theta)
    product(product(theta))


def single_samples(landscape: Landscape, theta: Tensor) -> None:
    for found in (*landscape.per_sample(theta), landscape.slopes(theta, theta)):
        assert found is not None and len(found) == landscape.n_samples
    assert len(landscape.curvatures(theta, theta)) == landscape.n_samples
    assert landscape.evaluate(theta).loss_error > 0


def peak(work: Work, samples: int, sender: Connection) -> None:
    """Send the largest size (kB) of a process that does some work."""
    torch.set_num_threads(1)
    landscape = Landscape(nn.Linear(WIDTH, 3), Stream(samples))
    work(landscape, landscape.theta)
    assert landscape.n_samples == samples
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("work", [two_products, single_samples], ids=lambda f: f.__name__)
def test_the_peak_memory_of_100000_samples_is_that_of_1000(work):
    """All of them would take 160 MB."""
    context = multiprocessing.get_context("fork")
    sizes = []
    for samples in (1_000, 100_000):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak, args=(work, samples, sender))
        process.start()
        assert receiver.poll(240)
        sizes.append(receiver.recv())
        process.join()
    assert sizes[1] < 1.1 * sizes[0]

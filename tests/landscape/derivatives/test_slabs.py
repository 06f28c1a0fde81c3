"""Tensors that are kept, in pieces of one allocation."""

from __future__ import annotations

import torch

from lsa.landscape.derivatives import slabs
from lsa.landscape.derivatives.slabs import Slabs


def test_what_is_kept_lies_together_and_as_it_did(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB", 4096)
    memory = Slabs()
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    kept = [images, torch.randn(7), torch.randn(5, 3).T, torch.randn(3000)]
    copies = [memory.copy(t) for t in kept]
    for t, copy in zip(kept, copies, strict=True):
        assert copy.stride() == t.stride() and torch.equal(copy, t)
    first, second, _, large = (t.untyped_storage().data_ptr() for t in copies)
    assert first == second != large
    copies[1].zero_()
    assert torch.equal(copies[0], images) and torch.equal(copies[2], kept[2])

"""torch's own optimiser as the truth."""

from __future__ import annotations

from typing import Any

import torch

from regpipe.engines.adam import Adam


def test_it_goes_where_torchs_optimiser_goes_to_the_bit() -> None:
    start = torch.randn(1, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    steppers: tuple[Any, Any] = Adam(ours, lr=0.1, eps=1e-6), torch.optim.Adam([theirs], lr=0.1, eps=1e-6)
    for _ in range(5):
        for tensor, stepper in zip((ours, theirs), steppers, strict=True):
            stepper.zero_grad()
            ((tensor - 1) ** 4 * tensor).sum().backward()
            stepper.step()
    assert not torch.equal(ours, start) and torch.equal(ours, theirs)

"""Which pairs an epoch sees; where only some have labels or landmarks, these get a share of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import ignite.distributed as idist
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from regpipe.utils.errors import InputError


class PairSampler(DistributedSampler):
    """A random part of the pairs each epoch, without repetition while there are enough, see ``draw``.

    Of several processes each gets its ``share`` of it, by a ``seed``: the k-th step of an epoch sees the same pairs
    whatever their number, as long as processes times batch size stay the same. The first ones are repeated where the
    shares would not be equally long.

    Args:
        known: which of the pairs are supervised, see ``losses.terms.supervised``.
        size: how many an epoch, all processes together; no more than there are.
        share: of them supervised, where only some pairs are; None: as they come.
        again: fill up an epoch with pairs that it has had already.
        seed: draw from it and the epoch alone; None: from torch's generator.
    """

    def __init__(
        self, known: Tensor, size: int, *, share: float | None = None, again: bool = False, seed: int | None = None
    ) -> None:
        super().__init__(cast("Dataset[Tensor]", known), idist.get_world_size(), idist.get_rank())
        self.known, self.size, self.share, self.begin = known, size, checked_share(share), seed
        self.drawn = size if again else min(size, len(known))
        self.num_samples = -(-self.drawn // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        generator = None if self.begin is None else torch.Generator().manual_seed(self.begin + self.epoch)
        drawn = draw(self.known, self.drawn, self.share, generator)
        places = torch.arange(self.num_samples) * self.num_replicas + self.rank
        return iter(drawn[places % len(drawn)].tolist())


def draw(known: Tensor, size: int, share: float | None, generator: torch.Generator | None = None) -> Tensor:
    """(size,) indices into ``known`` (N,) bool, in random order, of which a ``share`` are known.

    With few labelled subjects hardly a pair has both labels (20 of 160: one in 65): drawn as they come, supervision
    would be rare. All pairs of a kind are drawn once, in random order, before one is drawn again. Where all or none are
    known, or without a share, all are one kind.
    """
    kinds = [torch.arange(len(known))]
    counts = [size]
    if share is not None and 0 < int(known.sum()) < len(known):
        kinds = [known.nonzero()[:, 0], (~known).nonzero()[:, 0]]
        first = math.ceil(share * size)
        counts = [first, size - first]
    drawn = [_in_turn(kind, count, generator) for kind, count in zip(kinds, counts, strict=True)]
    return _in_turn(torch.cat(drawn), size, generator)


def _in_turn(items: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` of the items: random orders of all of them, one after another."""
    rounds = [items[torch.randperm(len(items), generator=generator)] for _ in range(-(-count // len(items)))]
    return torch.cat([items[:0], *rounds])[:count]


def checked_share(share: float | None) -> float | None:
    """Raises ``InputError`` where it is no share."""
    if share is not None and not 0 <= share <= 1:
        raise InputError(f"supervised_share is {share}: give 0 to 1, or null to draw the pairs as they come")
    return share

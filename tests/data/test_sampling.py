"""Which pairs an epoch sees."""

from __future__ import annotations

import pytest
import torch

from regpipe import InputError
from regpipe.data.sampling import PairSampler, draw


def test_a_cohort_of_one_kind_is_drawn_without_repetition() -> None:
    torch.manual_seed(0)
    for known in (torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)):
        drawn = draw(known, 12, 0.5)
        assert len(set(drawn.tolist())) == 12 and drawn.max() < 20
    assert sorted(draw(known, 20, 0.5).tolist()) == list(range(20))


def test_few_labelled_pairs_get_their_share_each_as_often_as_the_other() -> None:
    torch.manual_seed(0)
    known = torch.zeros(1000, dtype=torch.bool)
    known[[3, 500, 999]] = True
    drawn = draw(known, 60, 0.5)
    counts = torch.bincount(drawn, minlength=1000)
    assert counts[known].tolist() == [10, 10, 10]  # half of 60 by three
    assert int(counts[~known].max()) == 1 and len(drawn) == 60
    assert 5 < int(known[drawn[:30]].sum()) < 25  # mixed, not one kind after the other
    assert int(known[draw(known, 60, None)].sum()) <= 3  # as they come: nobody twice


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 10)])
def test_a_share_of_nothing_or_all_is_kept(share: float, count: int) -> None:
    known = torch.arange(30) < 10
    assert int(known[draw(known, 10, share)].sum()) == count


def test_an_epoch_of_one_pair_sees_a_supervised_one() -> None:
    assert draw(torch.arange(30) < 2, 1, 0.5).item() in (0, 1)


def test_the_same_seed_draws_the_same_and_an_epoch_longer_than_the_cohort_goes_round() -> None:
    sampler = PairSampler(torch.tensor([True, False, False]), 7, share=0.5, again=True)
    torch.manual_seed(4)
    first, second = list(sampler), list(sampler)
    torch.manual_seed(4)
    assert list(sampler) == first and len(sampler) == len(first) == len(second) == 7


def test_a_share_beyond_1_is_refused() -> None:
    with pytest.raises(InputError, match="supervised_share is 2"):
        PairSampler(torch.tensor([True]), 1, share=2)

"""The terms of the structures that a network sees: against labels, and against each other."""

from __future__ import annotations

import pytest
import torch

from helpers.terms import example, term
from regpipe.losses.loss import RegistrationLoss
from regpipe.utils.errors import InputError


def test_anatomy_is_0_for_what_the_labels_say_and_needs_to_know_which() -> None:
    r, target = example((20, 17))
    labels = torch.cat([target["fixed_label"], target["moving_label"]])
    sure = torch.cat([labels == 0, labels == 1, labels == 2], 1).float() * 60 - 30  # logits of the truth
    known = {**target, "anatomy": torch.cat(sure.chunk(2), 1)}
    assert float(term("anatomy", r, known, label_ids=(1, 2))) == pytest.approx(0, abs=1e-4)
    assert float(term("anatomy", r, target, label_ids=(1, 2))) > 0.5
    without = {key: value for key, value in known.items() if not key.endswith("label")}
    assert float(term("anatomy", r, without, label_ids=(1, 2))) == 0
    with pytest.raises(InputError, match="give --label_ids"):
        RegistrationLoss({"anatomy": 1.0})
    with pytest.raises(InputError, match="a network with structures"):
        term("predicted_dice", r, {key: value for key, value in target.items() if key != "anatomy"})


def test_predicted_dice_is_dice_where_the_network_is_right_and_sure() -> None:
    r, target = example((20, 17))
    labels = torch.cat([target["fixed_label"], target["moving_label"]])
    sure = torch.cat([labels == 0, labels == 1, labels == 2], 1).float() * 60 - 30
    known = {**target, "anatomy": torch.cat(sure.chunk(2), 1)}
    expected = float(term("dice", r, target, label_ids=(1, 2)))
    assert float(term("predicted_dice", r, known)) == pytest.approx(expected, rel=1e-4)

"""What is recorded of a run is what its objects are, whichever id changed them."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.training import workflow
from regpipe.engines.describe import same


@pytest.mark.usefixtures("restored")
def test_nested_overrides_are_recorded_too(bundle, cohort) -> None:
    nested: dict[str, Any] = {
        "network_def#backbone": "plain",
        "train#trainer#max_epochs": 7,
        "train#dataloader#batch_size": 3,
        "loss#window": 5,
        "loss#weights": {"ncc": 1.0, "diffusion": 0.5},
        "train#step#accumulate": 2,
        "typical": False,
        "augment": 0.02,
        "augment_intensity": 0.5,
        "mirror": [0],
    }
    flow = workflow(bundle, cohort, **nested)
    told = flow.parser.get_parsed_content("described").recipe
    assert (told["backbone"], told["batch_size"], told["accumulate"]) == ("plain", 3, 2)
    assert (told["max_epochs"], told["lncc_window"], told["loss"]) == (7, 5, "ncc=1 diffusion=0.5")
    assert told["loss_weights"] == {"ncc": 1.0, "diffusion": 0.5} and told["learning_rate"] == 0.02
    assert (told["augment"], told["augment_intensity"], told["mirror"]) == (0.02, 0.5, [0])
    scheduler = flow.parser.get_parsed_content("lr_scheduler")
    assert [scheduler.lr_lambdas[0](epoch) for epoch in (0, 3, 7)] == [1.0, 1.0, 0.01]  # of seven epochs
    assert len(flow.parser.get_parsed_content("validate#handlers")) == 3  # without what is typical


def test_a_term_of_no_weight_makes_no_difference_and_another_weight_does() -> None:
    old = {"loss": "lncc=1 dice=0 diffusion=0.7", "seed": 0, "gone": 1}
    assert same(old, {"loss": "lncc=1 diffusion=0.7", "seed": 0, "new": 2}) == []
    assert same(old, {"loss": "lncc=1", "seed": 1}) == ["loss: lncc=1 diffusion=0.7 -> lncc=1", "seed: 0 -> 1"]

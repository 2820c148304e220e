"""Runs in half precision, in groups of batches, that average weights or learn structures first go on as others do."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.training import Trained, assert_same, equal, kill_at, refusal, train, workflow
from regpipe.bundle.write import write_bundle

pytestmark = pytest.mark.usefixtures("restored")


def test_a_run_in_half_precision_and_groups_goes_on_as_if_there_had_been_no_stop(bundle, cohort, tmp_path) -> None:
    # a group of two, and one
    told: dict[str, Any] = {"amp": True, "accumulate": 2, "checkpointing": True, "pairs_per_epoch": 3}
    whole = train(write_bundle("alexnet", tmp_path / "whole"), cohort, 3, **told)
    assert_same(train(bundle, cohort, 3, into=train(bundle, cohort, 1, **told), **told), whole)
    assert {float(state["step"]) for state in whole.state["optimizer"]["state"].values()} == {6.0}
    message = refusal(bundle, cohort, 4, accumulate=1, amp=False, pairs_per_epoch=3)
    assert "accumulate: 2 -> 1" in message and "amp: True -> False" in message and "checkpointing" not in message


def test_a_run_that_averages_weights_and_learns_structures_first_goes_on_from_a_kill_in_any_epoch(
    bundle, cohort, tmp_path
) -> None:
    told: dict[str, Any] = {"average": 3, "structures_first": 0.5, "augment_intensity": 0.5, "label_ids": [1]}
    told["loss_weights"] = {"dice": 1.0, "anatomy": 1.0, "diffusion": 0.1}
    whole = train(write_bundle("alexnet", tmp_path / "whole"), cohort, 4, **told)
    assert [epoch for epoch, *_ in whole.validations] == [3, 4]
    found = Trained()
    for killed in (3, 5, 7):  # from epoch 1, within the structures; 2, at their end; 3
        with pytest.raises(RuntimeError):
            train(bundle, cohort, 4, stop=kill_at(killed), into=found, **told)
        found.curve = found.curve[: killed - 1]
    assert_same(train(bundle, cohort, 4, into=found, **told), whole)


def test_what_is_validated_and_kept_is_the_mean_of_the_weights(bundle, cohort) -> None:
    done = train(bundle, cohort, 2, average=3, val_interval=2)
    mean, last = done.state["averaged"], done.state["network"]
    assert equal(
        {f"module.{name}": value for name, value in done.model.items()} | {"n_averaged": mean["n_averaged"]}, mean
    )
    assert mean["n_averaged"] == 4 and not equal(done.model, last)
    flow = workflow(bundle, cohort, max_epochs=2, average=3, val_interval=2)
    evaluator, network = map(flow.parser.get_parsed_content, ("validate#evaluator", "network"))
    evaluator.network.load_state_dict(mean)
    network.load_state_dict(last)
    evaluator.run()
    assert evaluator.state.metrics["key_metric"] == done.validations[-1][1]

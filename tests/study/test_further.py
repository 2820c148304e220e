"""What a run is asked beside its Dice, of networks whose answers are known."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from torch import Tensor, nn

from regpipe.engines.inferers import RegistrationInferer
from regpipe.study.further import CHANGES, FURTHER, PAIRS, POINTS, Curve, Further, spread


class Shift(nn.Module):
    """Says that everything moved by ``voxels`` along the first axis, where the moving image is bright at its middle."""

    def __init__(self, voxels: float) -> None:
        super().__init__()
        self.voxels = nn.Parameter(torch.tensor(voxels))

    def forward(self, pair: Tensor) -> Tensor:
        found = torch.zeros(len(pair), 2, 17, 17)  # voxels of its own grid, twice as coarse
        found[:, 0] = self.voxels / 2 * (pair[:, 1, 16, 16] > 0.5).float()[:, None, None]
        return found


def item(shift: int, *, bright: float = 0.6) -> dict[str, Any]:
    """A square that stands ``shift`` voxels further in the moving image."""
    found: dict[str, Any] = {"case": "a", "fixed_landmarks": torch.empty(0, 2), "moving_landmarks": torch.empty(0, 2)}
    for side, begin in (("fixed", 10), ("moving", 10 + shift)):
        label = torch.zeros(1, 33, 33)
        label[:, begin : begin + 10, 8:24] = 1
        found |= {f"{side}_image": bright * label, f"{side}_label": label.to(torch.int16)}
    return found


@pytest.fixture
def asked() -> Further:
    return Further(Shift(4.0), RegistrationInferer(), [item(4)] * 3, (1.0, 1.0))


def test_changed_looks_change_what_a_network_sees_and_not_what_is_compared(asked: Further) -> None:
    found = asked.changed()
    assert [*found] == [f"dice_{name}" for name in CHANGES] and {*found} < {*FURTHER}
    assert found["dice_unchanged"] == found["dice_noise"] == 1.0
    for name in ("inverted", "gamma"):  # darker than half: it stays where it was, 6 of 10 rows
        assert found[f"dice_{name}"] == pytest.approx(0.6)
    assert asked.network.training


def test_noise_is_another_in_each_image_and_the_same_again() -> None:
    flat, looks = torch.full((1, 40, 40), 0.5), CHANGES["noise"]
    fixed, moving = looks(flat, "fixed"), looks(flat, "moving")
    assert float((fixed - flat).std()) == pytest.approx(0.05, rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([fixed.flatten(), moving.flatten()]))[0, 1])) < 0.1
    assert torch.equal(fixed, looks(flat, "fixed"))


def test_pairs_are_taken_from_first_to_last() -> None:
    cases = [{"case": str(i)} for i in range(400)]
    some = [int(case["case"]) for case in spread(cases)]
    assert len(some) == PAIRS and some[0] == 0 and some[-1] == 399 and max(np.diff(some)) <= 22
    assert spread(cases[:3]) == cases[:3]


def test_the_optimiser_goes_on_from_the_networks_answer(asked: Further) -> None:
    wrong = Further(Shift(0.0), RegistrationInferer(), [item(1, bright=1.0)] * 2, (1.0, 1.0))
    assert wrong.means()["dice"] == pytest.approx(0.9)
    refined = wrong.refined()
    assert refined["dice_unrefined"] == pytest.approx(0.9) and refined["dice_refined"] > 0.97
    assert asked.refined()["dice_refined"] > 0.97


def test_a_curve_says_when_a_training_was_nearly_there_without_the_time_of_looking(asked: Further) -> None:
    network, looked = asked.network, list[int]()

    def step(engine: Engine, _: object) -> None:
        network.voxels.data.fill_(4.0 if engine.state.iteration >= 30 else 0.0)  # type: ignore[operator]

    def slow() -> dict[str, float]:
        time.sleep(0.02)
        looked.append(1)
        return Further.means(asked)

    asked.means = slow  # type: ignore[method-assign, assignment]
    curve, engine = Curve(asked), Engine(step)
    curve.attach(engine)
    begun = time.perf_counter()
    engine.run(range(50), max_epochs=2)
    wall = time.perf_counter() - begun
    steps = [step for step, _, _ in curve.points]
    assert len(steps) - 1 == len(looked) == POINTS and steps[-1] == 100 and steps[:2] == [0, 1]
    dice = {step: dice for step, _, dice in curve.points}
    assert all(dice[step] == pytest.approx(1.0 if step >= 30 else 0.6) for step in steps)  # 0: before registration
    assert curve.spent()["seconds"] < wall - 0.02 * POINTS


def test_a_curve_of_a_training_that_ends_early_has_its_end(asked: Further) -> None:
    def step(engine: Engine, _: object) -> None:
        if engine.state.iteration == 3:
            engine.terminate()

    curve, engine = Curve(asked), Engine(step)
    curve.attach(engine)
    engine.run(range(5000), max_epochs=1)
    assert [step for step, _, _ in curve.points] == [0, 3]

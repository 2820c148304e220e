"""The gradient of two processes is that of one with all their pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer

from helpers.processes import together
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import list_pairs
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.engines.step import TrainingStep, gradient_scaler
from regpipe.io.images import Grid
from regpipe.losses.loss import RegistrationLoss
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import distributed

GRID = Grid((32, 32), (1.0, 1.0))

pytestmark = pytest.mark.usefixtures("one_thread")


LOSSES = {"lncc": 1.0, "diffusion": 0.7, "divergence": 0.1, "mse": 1.0, "known_field": 0.1}


def half_masked(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose pairs have masks of their own, the second one's a quarter of the first's."""
    for item, end in zip(items, (32, 8), strict=False):
        mask = torch.zeros_like(item["fixed_image"])
        mask[:, :end] = 1
        item["fixed_mask"] = item["moving_mask"] = mask
    return collate_pairs(items)


def gradients(
    data: str, which: list[int], wrap: Callable, *, masked: bool = False, cascades: int = 1, structures: int = 0
) -> dict[str, torch.Tensor]:
    """Of a network that registers; or, with structures, of one that looks for these only, twice: as it trains."""
    load, cases = LoadPair(GRID), list_pairs(data)
    everything = (half_masked if masked else collate_pairs)([load(case) for case in cases[:4]])
    batch = {key: value[which] if torch.is_tensor(value) else value for key, value in everything.items()}
    torch.manual_seed(0)
    net = SymmetricNet(2, "alexnet", structures=structures)
    loss = RegistrationLoss({"anatomy": 1.0} if structures else LOSSES, window=5, label_ids=range(1, structures + 1))
    seen_by_trainer = wrap(net)
    pair, target, _, told = prepare_batch(batch)
    if structures:
        told["structures_only"] = True
    for _ in range(2 if structures else 1):
        net.zero_grad()
        loss(RegistrationInferer(cascades=cascades)(pair, seen_by_trainer, **told), target).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"masked": True},
    "cascades": {"cascades": 2},
    "structures": {"structures": 2},
}


def accumulated(data: str, which: list[int], wrap: Callable) -> dict[str, torch.Tensor]:
    """The gradient of the trainer's one step over these pairs, each a batch of its own."""
    load, cases = LoadPair(GRID), list_pairs(data)
    torch.manual_seed(0)
    net = SymmetricNet(2, "alexnet")
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        1,
        [collate_pairs([load(cases[i])]) for i in which],
        wrap(net),
        torch.optim.SGD(net.parameters(), lr=1.0),
        RegistrationLoss(LOSSES, window=5),
        inferer=RegistrationInferer(),
        prepare_batch=prepare_batch,
        iteration_update=TrainingStep(gradient_scaler(torch.device("cpu"), amp=False), accumulate=len(which)),
        decollate=False,
    )
    trainer.run()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def all_gradients(rank: int, data: str) -> dict[str, dict[str, torch.Tensor]]:
    distributed.join(hours=0.02)
    found = {}
    for name, told in SETTINGS.items():
        wrap = functools.partial(distributed.parallel, in_parts=name == "structures")
        found[name] = gradients(data, [rank], wrap, **told)
    return {**found, "accumulated": accumulated(data, [rank, rank + 2], distributed.parallel)}


@pytest.fixture(scope="module")
def shared_gradients(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    return together(all_gradients, tmp_path_factory.mktemp("gradients"), str(data))


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_have_the_gradient_of_one_with_both_pairs(setting: str, data: Path, shared_gradients) -> None:
    def alone(net: torch.nn.Module) -> torch.nn.Module:
        return net

    both, first, second = (gradients(str(data), which, alone, **SETTINGS[setting]) for which in ([0, 1], [0], [1]))
    assert both.keys() == shared_gradients[0][setting].keys()
    for found in shared_gradients:
        for name, gradient in found[setting].items():
            torch.testing.assert_close(gradient, both[name], rtol=0, atol=1e-5)
            torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, rtol=0, atol=1e-8)  # round-off apart
    assert max(float((first[name] - g).abs().max()) for name, g in both.items()) > 1e-3  # one pair is not enough


def test_two_processes_that_accumulate_two_batches_each_have_the_gradient_of_all_four(
    data: Path, shared_gradients
) -> None:
    both = gradients(str(data), [0, 1, 2, 3], lambda net: net, **SETTINGS["plain"])
    half = gradients(str(data), [0, 1], lambda net: net, **SETTINGS["plain"])
    for found in shared_gradients:
        assert found["accumulated"].keys() == both.keys()
        for name, gradient in found["accumulated"].items():
            torch.testing.assert_close(gradient, both[name], rtol=0, atol=1e-5)
    assert max(float((half[name] - g).abs().max()) for name, g in both.items()) > 1e-3  # two pairs are not enough

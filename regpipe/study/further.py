"""What a run is asked beside its Dice: how soon it got there, and how it stands changed looks and refinement."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from regpipe.data.load import collate_pairs
from regpipe.data.pairs import SIDES, Case
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.engines.refine import WINDOW, make_refiner, refinement_loss
from regpipe.metrics.cases import CaseMetrics

PAIRS, BATCH = 20, 10  # held-out pairs, and how many the network sees at a time
EVERY, STEPS = 2, 30  # so many of them, one is refined; steps of Adam
POINTS = 12  # of a curve, close together at its beginning

Looks = Callable[[Tensor, str], Tensor]
CHANGES: dict[str, Looks] = {  # of images in [0, 1]
    "unchanged": lambda image, side: image,
    "inverted": lambda image, side: 1 - image if side == "moving" else image,
    "gamma": lambda image, side: image.clamp(min=0) ** 2 if side == "moving" else image,
    "noise": lambda image, side: image + 0.05 * _noise(image, side),
}
FURTHER = (*(f"dice_{name}" for name in CHANGES), "dice_unrefined", "dice_refined", "sdlogj_refined")


def spread(cases: Sequence[Case]) -> list[Case]:
    """``PAIRS`` of them from first to last: neighbours share their fixed image."""
    return [cases[i] for i in sorted({*np.linspace(0, len(cases) - 1, PAIRS).round().astype(int).tolist()})]


def _noise(image: Tensor, side: str) -> Tensor:
    generator = torch.Generator().manual_seed(SIDES.index(side))
    return torch.randn(image.shape, generator=generator).to(image)


class Further:
    """Measures a network on some pairs.

    Args:
        network: what is evaluated, as trained so far.
        inferer: what registers by it.
        items: of ``LoadPair``, without a batch axis.
        spacing: mm per voxel of the working grid.
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: RegistrationInferer,
        items: Sequence[Mapping[str, Any]],
        spacing: Sequence[float],
    ) -> None:
        self.network, self.inferer, self.items, self.spacing = network, inferer, items, spacing

    @torch.no_grad()
    def means(
        self, looks: Looks = CHANGES["unchanged"], *, inferer: RegistrationInferer | None = None, every: int = 1
    ) -> dict[str, float]:
        """Mean of each metric over the pairs, or one of ``every`` so many, each image seen through ``looks``."""
        metric, training = CaseMetrics(self.spacing), self.network.training
        device = next(self.network.parameters()).device
        items = [
            {**item, **{f"{side}_image": looks(item[f"{side}_image"], side) for side in SIDES}}
            for item in self.items[::every]
        ]
        self.network.eval()
        for begin in range(0, len(items), BATCH):
            pair, batch, _, told = prepare_batch(collate_pairs(items[begin : begin + BATCH]), device)
            metric.update({"pred": (inferer or self.inferer)(pair, self.network, **told), "batch": batch})
        self.network.train(training)
        return metric.compute()

    def changed(self) -> dict[str, float]:
        """Dice of the same pairs under each of ``CHANGES``."""
        return {f"dice_{name}": self.means(looks)["dice"] for name, looks in CHANGES.items()}

    def refined(self) -> dict[str, float]:
        """Dice and SDlogJ where the optimiser goes on from the network's answer; Dice of that answer."""
        dim, inferer = len(self.spacing), copy.copy(self.inferer)
        inferer.refiner = make_refiner(STEPS, refinement_loss("lncc", spatial_dims=dim), window=WINDOW[dim])
        found, before = self.means(inferer=inferer, every=EVERY), self.means(every=EVERY)
        return {"dice_unrefined": before["dice"], "dice_refined": found["dice"], "sdlogj_refined": found["sdlogj"]}


class Curve:
    """Handler: Dice over the steps of a training, and what the training took, without what measuring took."""

    def __init__(self, asked: Further) -> None:
        self.asked = asked
        self.points: list[tuple[int, float, float]] = []  # step, processor seconds, Dice; first that of no registration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stepped)
        engine.add_event_handler(Events.COMPLETED, self._ended)

    def _started(self, engine: Engine) -> None:
        assert engine.state.epoch_length and engine.state.max_epochs
        steps = engine.state.epoch_length * engine.state.max_epochs
        self._at = {max(1, round(steps * (k / POINTS) ** 2)) for k in range(1, POINTS + 1)}
        self._aside, self._begun = [0.0, 0.0], _clocks()

    def _stepped(self, engine: Engine) -> None:
        if engine.state.iteration in self._at:
            self._look(engine.state.iteration)

    def _ended(self, engine: Engine) -> None:  # earlier than it was to, by budget_seconds
        if not self.points or self.points[-1][0] != engine.state.iteration:
            self._look(engine.state.iteration)

    def _look(self, step: int) -> None:
        before, spent = _clocks(), self.spent()["cpu_seconds"]
        found = self.asked.means()
        self.points += (
            [(step, spent, found["dice"])]
            if self.points
            else [(0, 0.0, found["dice_before"]), (step, spent, found["dice"])]
        )
        self._aside = [a + now - then for a, now, then in zip(self._aside, _clocks(), before, strict=True)]

    def spent(self) -> dict[str, float]:
        """Seconds of the training until now, by the clock and of the processor."""
        spent = (now - then - a for now, then, a in zip(_clocks(), self._begun, self._aside, strict=True))
        return dict(zip(("seconds", "cpu_seconds"), spent, strict=True))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()

"""A network's metrics on other data while it trains, as curves; the best epoch is not chosen by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import Case, list_pairs
from regpipe.engines.inferers import prepare_batch
from regpipe.fields.algebra import Registration
from regpipe.metrics.measured import measure
from regpipe.metrics.measures import mean_of


class Readout:
    """Curves ``readout/<name>/<metric>`` of a network on other data while it trains; they do not choose the epoch.

    Attach it to the trainer. Each pair is registered on a grid of its own.

    Args:
        folders: name -> data, see ``regpipe.list_pairs``; none: no curves.
        evaluator: its network and inferer are asked.
        writer: where to.
        pairs: at most so many of each, drawn once.
        every: epochs between two points.
        affine: the stage before the network.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        *,
        evaluator: Any,
        writer: SummaryWriter,
        pairs: int = 10,
        every: int = 10,
        affine: str = "centre",
    ) -> None:
        self.evaluator, self.writer, self.every = evaluator, writer, every
        self.load = LoadPair(None, affine=affine, cache=False)
        self.cases = {name: list_pairs(folder, max_pairs=pairs) for name, folder in folders.items()}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.every), self)

    @idist.one_rank_only()
    def __call__(self, engine: Engine) -> None:
        for name, cases in self.cases.items():
            rows = [self._measure(case) for case in cases]
            for metric in rows[0]:
                mean = mean_of(row[metric] for row in rows)
                if math.isfinite(mean):
                    self.writer.add_scalar(f"readout/{name}/{metric}", mean, engine.state.epoch)

    @torch.no_grad()
    def _measure(self, case: Case) -> dict[str, float]:
        state = self.evaluator.state
        pair, batch, _, told = prepare_batch(collate_pairs([self.load(case)]), state.device)
        network = self.evaluator.network.eval()
        found = self.evaluator.inferer(pair, network, **told)
        spacing = self.load.grid_of(case).spacing
        return measure(Registration.of(found), batch, spacing)

"""The metrics of many cases: an Ignite metric for MONAI's evaluator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from ignite.metrics.metric import MetricUsage

from regpipe.fields.algebra import LAYERS, Layers
from regpipe.metrics.measured import measured
from regpipe.metrics.measures import mean_of
from regpipe.metrics.metric import columns, key_metric
from regpipe.metrics.table import read_rows as read_rows  # for those who know them by this module
from regpipe.metrics.table import write_csv as write_csv
from regpipe.utils.distributed import gathered
from regpipe.utils.errors import InputError

Row = dict[str, Any]  # "case" and one number per metric


class CaseMetrics(Metric):
    """Ignite metric that measures every case and averages over the cases of all processes.

    ``update`` takes ``{"pred": Registration's fields by name, "batch": collated batch}``. At the
    end of a run ``engine.state.metrics`` holds each mean under its own name, and the key metric
    under the attached name, turned so that higher is better;
    ``engine.state.metric_details["cases"]`` holds the rows.

    Args:
        spacing: mm per voxel of the working grid.
        key: a name of ``metrics.metric.columns``, or ``auto``: Dice if any case has labels, else TRE if
            any has landmarks, else NCC.
        layers: see ``metrics.measured.measure``.
        output_transform: from ``engine.state.output`` to what ``update`` takes.

    Raises:
        InputError: unknown ``key``; or, after a run, one that no case has.
    """

    def __init__(
        self,
        spacing: Sequence[float],
        *,
        key: str = "auto",
        layers: Layers = LAYERS,
        output_transform: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        if key != "auto" and key not in columns():
            names = ", ".join(["auto", *columns()])
            raise InputError(f"unknown metric {key!r}; choose one of {names}")
        self.spacing, self.key, self.layers = tuple(spacing), key, layers
        super().__init__(output_transform)

    def reset(self) -> None:
        self._rows: list[Row] = []

    @torch.no_grad()
    def update(self, output: Mapping[str, Any]) -> None:
        pred, batch = output["pred"], output["batch"]
        pairs = measured(pred, batch, self.spacing, layers=self.layers)
        self._rows += [{"case": case, **pair.row} for case, pair in zip(batch["case"], pairs, strict=True)]

    def compute(self) -> dict[str, float]:
        """Mean of each metric over the cases of all processes that have it.

        Raises:
            NotComputableError: without cases.
        """
        return _means(_gather(self._rows))

    def attach(self, engine: Engine, name: str, usage: str | MetricUsage = "epoch_wise") -> None:
        if name in columns():  # the negated TRE must not overwrite the TRE
            raise ValueError(f"{name!r} is a metric's own name; attach as 'key_metric' or the like")
        super().attach(engine, name, usage)

    def iteration_completed(self, engine: Engine) -> None:
        # Ignite's own would take a pair (y_pred, y) and refuses a mapping.
        self.update(self._output_transform(engine.state.output))

    def completed(self, engine: Engine, name: str) -> None:
        rows = _gather(self._rows)
        means = _means(rows)
        there = {name for name, mean in means.items() if not math.isnan(mean)}
        key = key_metric(there | {"ncc"}) if self.key == "auto" else self.key
        if math.isnan(means[key]):
            raise InputError(f"key metric {key}: no case has what it needs (labels or landmarks); choose another")
        engine.state.metrics.update(means)
        engine.state.metrics[name] = means[key] if columns()[key].higher else -means[key]
        details = getattr(engine.state, "metric_details", None) or {}  # MONAI's addition to Ignite
        engine.state.metric_details = {**details, "cases": rows}  # type: ignore[attr-defined]


def _means(rows: Sequence[Row]) -> dict[str, float]:
    if not rows:
        raise NotComputableError("CaseMetrics has seen no case")
    return {name: mean_of(row[name] for row in rows) for name in columns()}


def _gather(rows: list[Row]) -> list[Row]:
    # Rows of all processes, in the order of the data, of which each process has every n-th. A distributed sampler
    # repeats cases so that every process gets equally many; each case counts once.
    parts = gathered(rows)
    if len(parts) == 1:
        return list(rows)
    dealt = (row for turn in itertools.zip_longest(*parts) for row in turn if row is not None)
    return list({row["case"]: row for row in dealt}.values())

"""After a run of the evaluator: the CSV per case, the summary with intervals, and a table to read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from regpipe.data import manifest
from regpipe.metrics import cost
from regpipe.metrics.measures import bootstrap_interval, known
from regpipe.metrics.metric import columns, heading
from regpipe.metrics.table import write_csv
from regpipe.report.tensorboard_pages import COSTS, log_evaluation
from regpipe.utils.console import Progress, say
from regpipe.utils.files import replace_file


class EvaluationReport:
    """Handler of an evaluator with ``CaseMetrics``: writes ``metrics.csv`` and ``summary.json``, prints the table.

    Args:
        folder: where to.
        network: whose cost the summary states.
        shape: the working grid, for the FLOPs.
        training_seconds: what the training took.
        split: which part of the data it was, for the table.
        writer: TensorBoard's, told how the pairs held out of the training fare.
    """

    def __init__(
        self,
        folder: str,
        network: nn.Module,
        *,
        shape: Sequence[int],
        training_seconds: float,
        split: str,
        writer: SummaryWriter | None = None,
    ) -> None:
        self.folder, self.network, self.shape = Path(folder), network, tuple(shape)
        self.training_seconds, self.split, self.writer = training_seconds, split, writer
        self._seconds: list[float] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.bar.update())
        engine.add_event_handler(Events.COMPLETED, self)

    def _open(self, engine: Engine) -> None:
        self.bar = Progress(what="evaluating", unit="pairs", total=engine.state.epoch_length)

    def _start(self, engine: Engine) -> None:
        self._from = time.perf_counter()

    def _stop(self, engine: Engine) -> None:
        device: torch.device = engine.state.device  # type: ignore[attr-defined]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # Python is ahead of the GPU
        self._seconds.append(time.perf_counter() - self._from)

    def __call__(self, engine: Engine) -> None:
        self.bar.close()
        if idist.get_rank() > 0:
            return
        manifest.forget(self.folder)  # of an evaluation that was here before; the bundle writes the new one
        rows = engine.state.metric_details["cases"]  # type: ignore[attr-defined]
        write_csv(self.folder / "metrics.csv", rows)
        metrics = summarise(rows)
        result: dict[str, Any] = {
            "cases": len(rows),
            "metrics": metrics,
            # pictures to displacement and warps, both ways; the first case pays for warming up
            "seconds_per_pair": bootstrap_interval(self._seconds[1:] or self._seconds),
            "parameters": cost.parameters(self.network),
            "flops": cost.flops(self.network, self.shape),
            "peak_memory_bytes": cost.peak_memory(),  # of evaluating
            "training_seconds": None if math.isnan(self.training_seconds) else self.training_seconds,
        }
        replace_file(self.folder / "summary.json", json.dumps(result, indent=1).encode())
        if self.writer is not None and self.split == "validation":
            costs = (result["seconds_per_pair"][0], result["parameters"] / 1e6, result["flops"] / 1e9)
            log_evaluation(self.writer, metrics, dict(zip(COSTS, costs, strict=True)))
        say(table({"held out" if self.split == "validation" else self.split: metrics}))
        say(f"{len(rows)} cases, each in {self.folder / 'metrics.csv'}; labels warped by nearest neighbour")


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """metric -> [mean, low, high], a bootstrap interval over cases; metrics that no case has are left out."""
    values = {name: known(row[name] for row in rows) for name in columns()}
    return {name: list(bootstrap_interval(v)) for name, v in values.items() if len(v)}


def table(summaries: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: a line per name, a column per metric that any has, ``mean [low, high]``."""
    shown = {m: metric for m, metric in columns("table").items() if any(m in summary for summary in summaries.values())}
    lines = ["| | " + " | ".join(map(heading, shown)) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, summary in summaries.items():
        cells = [interval(summary[m], metric.digits) if m in summary else "" for m, metric in shown.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(value: Sequence[float], digits: int) -> str:
    """``0.731 [0.702, 0.755]``."""
    mean, low, high = (f"{v:.{digits}f}" for v in value)
    return f"{mean} [{low}, {high}]"

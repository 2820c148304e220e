"""Logs metrics, pictures, histograms and a profile to TensorBoard during a run, beside MONAI's scalars.

``docs/dashboard.md`` says which tab answers which question. ``report.tensorboard_pages`` logs what is written once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.profiler import profile
from torch.utils.tensorboard import SummaryWriter

from regpipe.metrics.measured import KEPT
from regpipe.metrics.measures import determinant_of
from regpipe.report.pictures import case_pictures
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

MOST_VALUES = 50_000  # in a histogram: more take time and change nothing


def tag_terms(terms: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Scalar names with a prefix: TensorBoard shows a chart per name, a group per prefix."""
    return {f"{prefix}/{name}": value for name, value in terms.items()}


def training_terms(output: Mapping[str, Any]) -> dict[str, float]:
    """A trainer's ``engine.state.output`` (``engines.step``) -> its loss terms and rate; none of an evaluator's."""
    rate = {"learning_rate": output["learning_rate"]} if "learning_rate" in output else {}
    return tag_terms({**output.get("terms", {}), **rate}, "training")


class MetricLog:
    """Writes the evaluator's metrics that are numbers, each its own curve ``validation/<metric>`` over epochs."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for name, value in tag_terms(engine.state.metrics, "validation").items():
            if math.isfinite(value):
                self.writer.add_scalar(name, value, engine.state.epoch)
        self.writer.flush()


class Curves:
    """The length of a run's TensorBoard logs, as a part of its saved state: resuming cuts off what came after.

    So each step is drawn once, however often it is repeated after a kill. ``curves.txt`` beside the states names the
    run's event files; other files in the folder are not touched.

    Args:
        writer: the run's.
        folder: where its states are.
    """

    def __init__(self, writer: SummaryWriter, folder: str) -> None:
        self.writer, self.names = writer, Path(folder) / "curves.txt"
        self._files: list[Path] = []

    def state_dict(self) -> dict[str, int]:
        """Event files, by name, and how many bytes of each there are."""
        if idist.get_rank() > 0:
            return {}
        self.writer.flush()
        return {file.name: file.stat().st_size for file in self._files if file.exists()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut the run's event files to their saved length; delete later ones."""
        if idist.get_rank() > 0:
            return
        folder, own = Path(self.writer.log_dir), Path(self.writer._get_file_writer().event_writer._file_name)
        written = self.names.read_text().splitlines() if self.names.exists() else []
        for name in set(written) - {own.name, *state}:
            (folder / name).unlink(missing_ok=True)
        for name, size in state.items():
            if (folder / name).exists() and (folder / name).stat().st_size > size:
                os.truncate(folder / name, size)
        self._files = [*(folder / name for name in state), own]
        replace_file(self.names, "".join(f"{file.name}\n" for file in self._files).encode())


class PictureLog:
    """Writes fixed, moving, warped, checkerboard, overlay, grid and Jacobian of the first validation cases.

    With ``spacing`` also histograms of the displacement's length and of the volume change.

    Args:
        writer: where to.
        cases: how many of the first cases; the same ones each time.
        spacing: mm per voxel of the working grid.
    """

    def __init__(self, writer: SummaryWriter, *, cases: int = 2, spacing: Sequence[float] | None = None) -> None:
        self.writer, self.cases, self.spacing = writer, cases, spacing

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        case, epoch = engine.state.iteration, engine.state.epoch
        if case > self.cases:
            return
        output: Any = engine.state.output
        u, known = output["pred"]["displacement"], output["pred"].get(KEPT)
        determinant = known[0].determinant if known else determinant_of(u[0].detach())
        for name, picture in case_pictures(output["label"], output["pred"], determinant).items():
            self.writer.add_image(f"case_{case}/{name}", picture, epoch, dataformats="HWC")
        if self.spacing is not None:
            for name, values in case_values(u, self.spacing, determinant).items():
                self.writer.add_histogram(f"case_{case}/{name}", values, epoch)


def case_values(
    displacement: Tensor, spacing: Sequence[float], determinant: Tensor | None = None
) -> dict[str, np.ndarray]:
    """Length of the displacement in mm and log det J at voxels of the first case of (B, D, *S), for histograms.

    Folded voxels have no logarithm; their share is the curve ``validation/folds_percent``.
    """
    u = displacement[:1].detach().cpu().float()
    mm = torch.tensor([float(s) for s in spacing]).view(1, -1, *[1] * (u.ndim - 2))
    det = determinant_of(u[0]) if determinant is None else determinant.detach().cpu()
    values = {"displacement_mm": (u * mm).norm(dim=1), "log_jacobian": det[det > 0].log()}
    flat = ((name, value.flatten()) for name, value in values.items() if value.numel())
    return {name: value[:: -(-len(value) // MOST_VALUES)].numpy() for name, value in flat}


class Profile:
    """Profiles the operations of some training steps.

    The slowest operations go to the Text tab, all calls to ``profile.json`` beside the logs, for ui.perfetto.dev.

    Args:
        writer: where to.
        steps: how many, after one warm-up step; 0 for none.
    """

    def __init__(self, writer: SummaryWriter, *, steps: int = 0) -> None:
        if not (isinstance(steps, int) and steps >= 0):
            raise InputError(f"--profile_steps {steps}: give a whole number, or 0 for none")
        self.writer, self.steps = writer, steps

    def attach(self, engine: Engine) -> None:
        if self.steps and idist.get_rank() == 0:
            self._begun, self._profile = 0, profile()
            engine.add_event_handler(Events.ITERATION_STARTED, self._step)
            engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._end)

    def _step(self, engine: Engine) -> None:
        self._begun += 1
        if self._begun == 2:
            self._profile.start()
        elif self._begun == self.steps + 2:
            self._end(engine)

    def _end(self, engine: Engine) -> None:
        if self._begun < 2 or not self.steps:
            return
        self.steps = 0
        self._profile.stop()
        longest = self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        self.writer.add_text("profile", "\n".join(f"    {line}" for line in longest.splitlines()), engine.state.epoch)
        self._profile.export_chrome_trace(str(Path(self.writer.log_dir) / "profile.json"))

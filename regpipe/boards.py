"""What goes to TensorBoard beside MONAI's scalars: pictures of fixed cases, and hyper-parameters with results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from regpipe import report


def tag_terms(terms: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Scalar names as TensorBoard groups them: one chart a name, one group a prefix."""
    return {f"{prefix}/{name}": value for name, value in terms.items()}


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


class PictureLog:
    """Writes fixed, moving, warped, checkerboard, overlay, grid and Jacobian of the first validation cases.

    Args:
        writer: where to.
        cases: how many of the first cases, the same ones each time.
    """

    def __init__(self, writer: SummaryWriter, *, cases: int = 2) -> None:
        self.writer, self.cases = writer, cases

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration > self.cases:
            return
        output: Any = engine.state.output
        for name, picture in case_pictures(output["label"], output["pred"]).items():
            tag = f"case_{engine.state.iteration}/{name}"
            self.writer.add_image(tag, picture, engine.state.epoch, dataformats="HWC")


def case_pictures(batch: Mapping[str, Any], prediction: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """``regpipe.report.pictures`` of the first case of a batch."""

    def array(tensor: Tensor) -> np.ndarray:
        return tensor[0].detach().cpu().float().numpy()

    return report.pictures(
        array(batch["fixed_image"])[0],
        array(batch["moving_image"])[0],
        array(prediction["warped_moving"])[0],
        array(prediction["displacement"]),
    )


def log_hyperparameters(writer: SummaryWriter, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """One row of the HParams page: settings, and the best epoch's metrics as ``best/<metric>``."""
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
    finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
    writer.add_hparams(plain, tag_terms(finite, "best"), run_name=".")
    writer.flush()

"""Trainings in this process that can be stopped anywhere, and compared to the bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from regpipe.engines import run
from regpipe.utils.errors import cause

SETTINGS = {
    "holdout": 2,
    "pairs_per_epoch": 2,  # of 3: the order and the choice are drawn each epoch
    "learning_rate": 0.02,  # so that eight steps move a label by a voxel
    "validate#handlers#0#cases": 0,  # pictures take time and draw nothing
}


class Trained:
    """What a training did and what it left."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, tuple[str, ...], float]] = []  # iteration, cases, loss
        self.validations: list[tuple[int, float, float]] = []  # epoch, key metric, the best so far

    def load(self, bundle: Path) -> Trained:
        self.model = torch.load(bundle / "models" / "model.pt", weights_only=True)
        self.state = torch.load(run.saved_states(bundle / "models")[-1], weights_only=True)
        return self


def workflow(bundle: Path, cohort: Path | None, *, overlays: Sequence[Path] = (), **settings: Any) -> ConfigWorkflow:
    """New objects, as in a new process, whose generators are not where the last ones stopped."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(time.time_ns() % 2**32)
    settings = {"bundle_root": str(bundle), **SETTINGS, **settings}
    if cohort is not None:  # else the overlays have data of their own
        settings["dataset_dir"] = str(cohort)
    file, meta = (str(bundle / "configs" / name) for name in ("train.yaml", "metadata.json"))
    flow = ConfigWorkflow(
        [file, *map(str, overlays)], meta_file=meta, logging_file=False, run_id="training", **settings
    )
    flow.initialize()
    return flow


def train(
    bundle: Path,
    data: Path | None,
    epochs: int,
    *,
    into: Trained | None = None,
    stop: Callable | None = None,
    **settings: Any,
) -> Trained:
    """Train up to an epoch with the bundle's own configuration; ``stop`` is called after each iteration."""
    flow, done = workflow(bundle, data, max_epochs=epochs, **settings), into or Trained()
    trainer, evaluator = map(flow.parser.get_parsed_content, ("train#trainer", "validate#evaluator"))

    def note() -> None:
        state = trainer.state
        done.curve.append((state.iteration, tuple(state.batch["case"]), state.output["terms"]["loss"]))

    def validated() -> None:
        state = evaluator.state
        done.validations.append((state.epoch, state.metrics["key_metric"], state.best_metric))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    evaluator.add_event_handler(Events.COMPLETED, validated)
    if stop:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    flow.run()
    return done.load(bundle)


def kill_at(iteration: int) -> Callable:
    def kill(engine: Any) -> None:
        if engine.state.iteration == iteration:
            raise MemoryError("killed")

    return kill


def equal(a: Any, b: Any) -> bool:
    """To the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.curve == expected.curve and found.validations == expected.validations
    assert equal(found.model, expected.model)
    for name in ("network", "optimizer", "lr_scheduler", "stopper", "random", "trainer", "averaged"):
        assert equal(found.state[name], expected.state[name]), name
    for name in ("settings", "best", "metric"):
        assert found.state["progress"][name] == expected.state["progress"][name]


def refusal(bundle: Path, cohort: Path, epochs: int, **settings: Any) -> str:
    """The line that the user sees in the end: MONAI wraps the error."""
    with pytest.raises(RuntimeError) as caught:
        train(bundle, cohort, epochs, **settings)
    return str(cause(caught.value))

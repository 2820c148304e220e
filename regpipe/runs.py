"""A training run as a whole: what is checked before it, what is saved of it, how it stops and goes on."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping
from monai.utils import set_determinism
from torch.optim.lr_scheduler import LambdaLR

from regpipe import distributed, record
from regpipe.checks import check_pairs
from regpipe.errors import InputError, one_line_errors, out_of_memory
from regpipe.images import Grid, save_grid
from regpipe.ladder import LESS_MEMORY
from regpipe.options import refuse_unknown
from regpipe.pairs import Case

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10


def begin(seed: int) -> None:
    """Seed every random number generator; let mistakes of the user, misspelt options too, end in a line."""
    one_line_errors()
    refuse_unknown()
    set_determinism(seed=seed)


def require(cases: Sequence[Case], *, landmark_channels: int | None = None) -> None:
    """Read every file once before training starts.

    Raises:
        InputError: naming the files, if any case has a problem.
    """
    here, first = distributed.share(cases), idist.get_rank() == 0
    problems = distributed.merged(check_pairs(here, landmark_channels=landmark_channels, progress=first))
    if problems:
        found = list(dict.fromkeys(problems.values()))
        more = len(found) - SHOWN_PROBLEMS
        lines = found[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(f"{len(problems)} of {len(cases)} pairs cannot be used:", *lines)


class RandomState:
    """The states of torch's, CUDA's, numpy's and Python's generators, in types that ``weights_only`` loads."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, position, *gauss = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, *gauss],
            "python": list(random.getstate()[1]),
            "python_gauss": random.getstate()[2],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate((3, tuple(state["python"]), state.get("python_gauss")))


class Standing:
    """What a run has reached: its settings, the best metrics so far, the seconds spent.

    Loading the state of a run with other settings is refused.
    """

    def __init__(self, evaluator: Engine, settings: Mapping[str, Any]) -> None:
        self.evaluator: Any = evaluator  # MONAI adds the best metric to Ignite's state
        self.settings = json.dumps(dict(settings), sort_keys=True, default=str)
        self.best: dict[str, float] = {}
        self._started, self._before = time.monotonic(), 0.0
        evaluator.add_event_handler(Events.COMPLETED, self._note_best)

    def _note_best(self, engine: Engine) -> None:
        state: Any = engine.state
        if state.best_metric_epoch == state.epoch:
            self.best = {k: v for k, v in state.metrics.items() if isinstance(v, float) and math.isfinite(v)}

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, all its parts together."""
        return self._before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        state = self.evaluator.state
        metric = [float(state.best_metric), int(state.best_metric_epoch)]
        return {"settings": self.settings, "best": self.best, "metric": metric, "seconds": self.seconds}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ``InputError`` where the state of a run with other settings is given."""
        old, new = json.loads(state["settings"]), json.loads(self.settings)
        # what only one of them knows is another version's, no difference
        changed = [f"{k}: {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k]]
        if changed:
            raise InputError(
                f"the run saved here had other settings ({'; '.join(changed)}): "
                "give another --ckpt_dir, or --resume False to begin anew"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check(state)
        self.best = state["best"]
        self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["metric"]
        self._before, self._started = state["seconds"], time.monotonic()


class Run:
    """A trainer with its evaluator, whose whole state is saved after each epoch and can be gone on from.

    Two files are kept, ``checkpoint_<epoch>.pt``, each written aside and renamed, so that a killed run never leaves
    half of one. Make it after the trainer has its other handlers: what those draw from the random state in an epoch
    belongs to that epoch.

    Args:
        trainer: MONAI's trainer.
        evaluator: MONAI's evaluator with a key metric, run by the trainer.
        objects: what else has a state, by name: network, optimizer, lr_scheduler.
        folder: where the files are.
        settings: the choices that make two runs comparable.
        patience: validations without a better key metric until training stops.
    """

    def __init__(
        self,
        trainer: Engine,
        evaluator: Engine,
        *,
        objects: Mapping[str, Any],
        folder: str,
        settings: Mapping[str, Any],
        patience: int,
    ) -> None:
        self.trainer, self.folder = trainer, Path(folder)
        self.standing = Standing(evaluator, settings)
        self.stopper = EarlyStopping(patience, _key_metric, trainer)
        evaluator.add_event_handler(Events.COMPLETED, self.stopper)
        self.objects = {
            **objects,
            "trainer": trainer,
            "stopper": self.stopper,
            "progress": self.standing,
            "random": RandomState(),
        }
        self._saver = Checkpoint(
            self.objects,
            DiskSaver(folder, require_empty=False, create_dir=True),
            filename_pattern="checkpoint_{global_step}.pt",
            n_saved=2,
            global_step_transform=lambda engine, _: engine.state.epoch,
            include_self=True,
        )
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._saver)

    @property
    def best_metrics(self) -> dict[str, float]:
        """The validation metrics of the best epoch so far, and the training time in seconds."""
        return {**self.standing.best, "training_seconds": self.standing.seconds}

    def check(self) -> dict[str, Any] | None:
        """The newest saved state, None where there is none; ask for it before anything else is written over.

        Raises:
            InputError: it cannot be read, or it belongs to a run with other settings.
        """
        files = saved_states(self.folder)
        if not files:
            return None
        try:
            saved = torch.load(files[-1], map_location="cpu", weights_only=True)
            self.standing.check(saved["progress"])
        except InputError:
            raise
        except Exception as error:  # a damaged file fails in many ways
            raise _damaged(files[-1], error) from error
        return saved

    def resume(self) -> int:
        """Bring back the newest state; returns its epoch, 0 where there is none.

        Raises:
            InputError: as ``check``.
        """
        saved = self.check()
        if saved is None:
            return 0
        state, file = self.trainer.state, saved_states(self.folder)[-1]
        wanted, steps = state.max_epochs, state.epoch_length or 0
        try:
            # a state of before there was a scaler has none
            Checkpoint.load_objects({**self.objects, "checkpointer": self._saver}, {"scaler": {}, **saved})
        except Exception as error:  # another network's, of the same settings
            raise _damaged(file, error) from error
        state.max_epochs = wanted
        if steps != state.epoch_length:  # another number of processes, another number of steps
            state.epoch_length, state.iteration = steps, state.epoch * steps
        for scheduler in self.objects.values():
            if isinstance(scheduler, LambdaLR):
                _follow(scheduler)
        log.info("going on after epoch %d, from %s", self.trainer.state.epoch, file)
        return int(self.trainer.state.epoch)

    def train(self) -> None:
        """Train, going on from the newest saved state where there is one; Ctrl-C ends it with that state kept.

        Raises:
            InputError: as ``check``; or the saved run is longer than this one shall be.
            SystemExit: with 130, on Ctrl-C.
        """
        epoch, epochs = self.resume(), self.trainer.state.max_epochs or 0
        if epoch > epochs:
            message = f"the run saved in {self.folder} has {epoch} epochs already, more than max_epochs {epochs}"
            raise InputError(f"{message}: give another --ckpt_dir")
        if epoch == epochs:
            print(f"all {epochs} epochs are done: give more --max_epochs to go on")
            return
        if self._stopped_early():
            return
        try:
            self.trainer.run()
        except KeyboardInterrupt:
            print(f"\nstopped in epoch {self.trainer.state.epoch}: the same command goes on from the last whole epoch")
            raise SystemExit(130) from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(f"out of memory in epoch {self.trainer.state.epoch}: {LESS_MEMORY}") from error
        self._stopped_early()
        state: Any = self.standing.evaluator.state
        if state.best_metric_epoch > 0:
            print(f"best epoch {state.best_metric_epoch}, key metric {state.best_metric:.4f}; weights in {self.folder}")
        else:
            raise InputError("no epoch was validated, so there is no model: give more time, or --val_interval 1")

    def _stopped_early(self) -> bool:
        """Whether the patience is used up; says so."""
        worse, patience = self.stopper.counter, self.stopper.patience
        if worse >= patience:
            print(f"stopped: {worse} validations without a better key metric; give more --patience to go on")
        return worse >= patience


def _damaged(file: Path, error: Exception) -> InputError:
    why = str(error).partition("\n")[0] or type(error).__name__
    return InputError(f"{file}: cannot be gone on from ({why}); delete it to take the one before")


def _follow(scheduler: LambdaLR) -> None:
    """Set the learning rates as the schedule has them now: one over more epochs differs from the one saved."""
    for group, rate, rule in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * rule(scheduler.last_epoch)


def check_supervision(
    cases: Sequence[Case], weights: Mapping[str, float], *, landmark_channels: int | None, augment: float
) -> None:
    """Raises ``InputError`` where a loss term has a weight and no training pair has what it needs."""
    if weights.get("known_field") and augment:
        raise InputError("loss term known_field: a true displacement no longer holds with --augment; give one of them")
    needs = {"dice": "fixed_label", "anatomy": "fixed_label", "landmarks": "fixed_landmarks"}
    needs["known_field"] = "displacement"
    if landmark_channels is not None:
        needs["landmarks"] = "fixed_label"
    for term, key in needs.items():
        both = (key, key.replace("fixed_", "moving_"))
        if weights.get(term) and not any(all(k in case for k in both) for case in cases):
            raise InputError(f"loss term {term}: no training pair has {key}; leave the term out, or add the files")


def refuse_detached(refiner: object, repair: object) -> None:
    """Raises ``InputError`` where training would have no gradient."""
    if refiner is not None or repair:
        raise InputError("--repair and refinement have no gradient: give them to evaluating or inference")


@idist.one_rank_only(with_barrier=True)
def keep_beside_model(ckpt_dir: str, grid: Grid, cases: Sequence[Case], data: dict[str, Any]) -> None:
    """Write the working grid, and what the model is trained on: see ``regpipe.record``."""
    save_grid(Path(ckpt_dir) / "working_grid.json", grid)
    record.write(ckpt_dir, cases, data)


@idist.one_rank_only(with_barrier=True)
def forget(ckpt_dir: str, log_dir: str) -> None:
    """Delete a run's states, model and curves: one that begins anew must not be mixed with an old one."""
    for path in (*saved_states(ckpt_dir), Path(ckpt_dir) / "model.pt", *Path(log_dir).glob("events.out.*")):
        path.unlink(missing_ok=True)


def same_dimension(spatial_dims: int | None, grid: Grid) -> None:
    """Raises ``InputError`` where the dimension that was asked for is not the data's."""
    if spatial_dims not in (None, len(grid.shape)):
        raise InputError(
            f"--spatial_dims {spatial_dims}, but the data are {len(grid.shape)}D: leave it out, or give other data"
        )


def saved_states(folder: str | Path) -> list[Path]:
    """The full checkpoints in a folder, oldest first."""
    found = Path(folder).glob("checkpoint_*.pt")
    return sorted(found, key=lambda path: int(path.stem.rpartition("_")[2]))


def training_seconds(folder: str | Path) -> float:
    """Wall-clock seconds that the run saved in ``folder`` took; NaN where its checkpoints are gone."""
    files = saved_states(folder)
    return (
        float(torch.load(files[-1], map_location="cpu", weights_only=True)["progress"]["seconds"])
        if files
        else math.nan
    )


def _key_metric(engine: Engine) -> float:
    state: Any = engine.state
    return float(state.metrics[state.key_metric_name])

"""A training run as a whole: what is checked before it, what is saved of it, how it stops and goes on."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EarlyStopping
from monai.utils import get_seed, set_determinism
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from regpipe.data.checks import check_pairs
from regpipe.data.pairs import SIDES, Case
from regpipe.engines import checkpoints, describe, record
from regpipe.engines.checkpoints import saved_states
from regpipe.engines.checkpoints import training_seconds as training_seconds  # where bundles ask for it
from regpipe.engines.options import begin_command
from regpipe.io.images import Grid, save_grid
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.terms import needing, supervision
from regpipe.metrics import typical
from regpipe.utils import distributed
from regpipe.utils.console import say
from regpipe.utils.errors import LESS_MEMORY, InputError, explain, out_of_memory
from regpipe.utils.files import sweep

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10
LATER = ("scaler", "curves", "averaged", "structures", "best")  # objects that the states of older versions lack


def begin(seed: int) -> None:
    """Seed every random number generator; see also ``engines.options.begin_command``."""
    begin_command()
    set_determinism(seed=seed)


def begin_together(seed: int, hours: float) -> None:
    """``begin`` in each of several processes, which meet; ``hours``: see ``utils.distributed.join``."""
    begin(seed)
    distributed.join(hours=hours, nccl=True)


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
        changed = describe.same(json.loads(state["settings"]), json.loads(self.settings))
        if changed:
            raise InputError(f"the run saved here had other settings ({'; '.join(changed)}): {checkpoints.ANEW}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check(state)
        self.best = state["best"]
        self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["metric"]
        self._before, self._started = state["seconds"], time.monotonic()


class Run:
    """A trainer with its evaluator, whose whole state is saved after each epoch and can be resumed.

    See ``engines.checkpoints``. Make it after the trainer's other handlers are attached: the random numbers that they
    draw in an epoch belong to that epoch.

    Args:
        trainer: MONAI's trainer.
        evaluator: MONAI's evaluator with a key metric, run by the trainer.
        objects: what else has a state, by name: network, optimizer, lr_scheduler, curves.
        folder: where the files are.
        settings: the choices that make two runs comparable.
        stopper: ends it where nothing gets better: ``handlers.stopper``.
    """

    def __init__(
        self,
        trainer: Engine,
        evaluator: Engine,
        *,
        objects: Mapping[str, Any],
        folder: str,
        settings: Mapping[str, Any],
        stopper: EarlyStopping,
    ) -> None:
        self.trainer, self.folder = trainer, Path(folder)
        self.standing = Standing(evaluator, settings)
        self.stopper = stopper
        evaluator.add_event_handler(Events.COMPLETED, self.stopper)
        self.objects = {
            **objects,
            "trainer": trainer,
            "stopper": self.stopper,
            "progress": self.standing,
            "random": checkpoints.RandomState(),
        }
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self.objects.items()}
        if idist.get_rank() == 0:
            checkpoints.save(self.folder, self.trainer.state.epoch, state)

    @property
    def best_metrics(self) -> dict[str, float]:
        """The validation metrics of the best epoch so far, and the training time in seconds."""
        return {**self.standing.best, "training_seconds": self.standing.seconds}

    def check(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest sound state and its file, None where there is none; ask before anything else is written over.

        Raises:
            InputError: none can be read, or it belongs to a run with other settings.
        """
        found = checkpoints.newest(self.folder)
        if found is not None:
            try:
                self.standing.check(found[1]["progress"])
            except (KeyError, TypeError) as error:  # not a state of ours
                raise _unfit(found[0], error) from error
        return found

    def resume(self) -> int:
        """Bring back the newest state; returns its epoch, 0 where there is none.

        Raises:
            InputError: as ``check``.
        """
        found = self.check()
        if idist.get_rank() == 0:  # what a kill left
            sweep(self.folder, "*")
            if found is not None:
                checkpoints.prune(found[0])
        if found is None:
            if "curves" in self.objects:  # of a first epoch that was broken off
                self.objects["curves"].load_state_dict({})
            return 0
        file, saved = found
        state = self.trainer.state
        wanted, steps = state.max_epochs, state.epoch_length or 0
        states = saved_states(self.folder)
        for damaged in states[states.index(file) + 1 :]:
            log.warning("%s: damaged; going on from %s, the one before", damaged, file.name)
        try:
            Checkpoint.load_objects(self.objects, {**dict.fromkeys(LATER, {}), **saved})
        except (KeyError, RuntimeError, ValueError) as error:  # another network's, of the same settings
            raise _unfit(file, error) from error
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
            say(f"all {epochs} epochs are done: give more --max_epochs to go on")
            return
        if self._stopped_early():
            return
        try:
            self.trainer.run()
        except KeyboardInterrupt:
            say(f"\nstopped in epoch {self.trainer.state.epoch}: the same command goes on from the last whole epoch")
            raise SystemExit(130) from None
        except Exception as error:  # what _fault does not know is raised as it is
            why = _fault(error, self.trainer.state.epoch)
            if why is None:
                raise
            raise InputError(f"{why}; the same command goes on from the last whole epoch") from error
        self._stopped_early()
        state: Any = self.standing.evaluator.state
        if state.best_metric_epoch > 0:
            say(f"best epoch {state.best_metric_epoch}, key metric {state.best_metric:.4f}; weights in {self.folder}")
        else:
            raise InputError(
                "no epoch was validated, so there is no model: more time, --val_interval 1, or less --structures_first"
            )

    def _stopped_early(self) -> bool:
        """Whether the patience is used up; says so."""
        worse, patience = self.stopper.counter, self.stopper.patience
        if worse >= patience:
            say(f"stopped: {worse} validations without a better key metric; give more --patience to go on")
        return worse >= patience


def _fault(error: Exception, epoch: int) -> str | None:
    """What ended a training from outside: memory, a killed process, the disk; None for any other error."""
    if out_of_memory(error):
        return f"out of memory in epoch {epoch}: {LESS_MEMORY}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        why = f"a process that loads data was ended in epoch {epoch}, perhaps for lack of memory"
        return f"{why}; give fewer --num_workers"
    told = explain(error) if isinstance(error, OSError) else None
    return told and f"epoch {epoch} was broken off: {told}"


def _unfit(file: Path, error: Exception) -> InputError:
    why = str(error).partition("\n")[0] or type(error).__name__
    return InputError(f"{file}: cannot be resumed ({why}); {checkpoints.ANEW}")


def _follow(scheduler: LambdaLR) -> None:
    """Set the learning rates by the present schedule: over more epochs it differs from the saved one."""
    for group, rate, rule in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * rule(scheduler.last_epoch)


def check_training(training: describe.Training, loss: nn.Module) -> None:
    """Check that there is a gradient, and that some training pair has what each loss term needs.

    ``loss``: the bundle's.

    Raises:
        InputError: one of MONAI's own inferers; two learning rates or seeds; refinement or repair in training; a loss
            beside the bundle's, or one without terms; a term of which no pair has what it needs.
    """
    if training.loss is not loss or not isinstance(loss, RegistrationLoss):
        raise InputError(
            f"{type(training.loss).__name__} as loss_function or loss: it would have no curves, no weight and no "
            "place in the record; list it by name in loss_terms, and give that name a weight in loss_weights"
        )
    rate, asked = training.learning_rate, training.trainer.optimizer.defaults.get("lr")
    if asked is not None and not math.isclose(rate, asked):
        raise InputError(f"--optimizer#lr {asked}: its parameters have {rate} of their own; give --learning_rate")
    if training.split.seed != get_seed():
        raise InputError(f"two seeds, {get_seed()} and of the split {training.split.seed}: give --seed alone")
    inferer = training.trainer.inferer
    if type(inferer).__module__.startswith("monai."):  # its window would put the coarser velocity in wrong places
        raise InputError(
            f"{type(inferer).__name__} as inferer: it gives no registration of a velocity on a coarser grid; leave "
            "regpipe's, and where memory is short give a smaller --grid_shape or --checkpointing True"
        )
    if getattr(inferer, "refiner", None) is not None or getattr(inferer, "repair", False):
        raise InputError("--repair and refinement have no gradient: give them to evaluating or inference")
    dataset, weights, terms = training.loader.dataset, loss.weights, loss.terms
    augment = training.augmentation
    moved = augment is not None and (augment.amount or augment.mirror) or training.moved_by_monai
    cases = training.pairs
    if weights.get("clean") and not getattr(dataset, "clean", False):
        raise InputError("loss term clean: only pairs of configs/synthetic.yaml have clean images; give it no weight")
    from_fields = needing(weights, "displacement")
    if from_fields and moved:
        why = "a true displacement no longer holds with --augment, --mirror or MONAI's spatial transforms"
        raise InputError(f"loss term {from_fields[0]}: {why}; give one of them")
    kinds = supervision(weights, landmark_channels=training.load.landmark_channels, terms=terms)
    needs = {term: [f"{side}_{kind}" for side in SIDES] for term, kind in kinds.items()}
    needs |= {term: ["displacement"] for term in from_fields}
    for term, keys in needs.items():
        if not any(all(key in case for key in keys) for case in cases):
            key = keys[0]
            raise InputError(f"loss term {term}: no training pair has {key}; leave the term out, or add the files")


@idist.one_rank_only(with_barrier=True)
def keep_beside_model(
    ckpt_dir: str, training: describe.Training, *, affine: str, own_grids: bool, to_fit_memory: Sequence[str]
) -> None:
    """Write the working grid, what the model is trained on (``engines.record``) and its looks (``metrics.typical``).

    ``affine`` and what follows: see ``describe.Training.data``.
    """
    if training.load.grid is not None:
        save_grid(Path(ckpt_dir) / "working_grid.json", training.load.grid)
    cases = training.pairs
    record.write(ckpt_dir, cases, training.data(affine, own_grids=own_grids, to_fit_memory=to_fit_memory))
    typical.write_images(ckpt_dir, cases)


@idist.one_rank_only(with_barrier=True)
def forget(ckpt_dir: str, log_dir: str, *, resume: bool) -> None:
    """Delete a run's states, model and curves, unless it is to ``resume``: a new run must not mix with an old one."""
    if resume:
        return
    beside = (Path(ckpt_dir) / name for name in ("model.pt", "curves.txt", typical.NAME))
    for path in (*saved_states(ckpt_dir), *beside, *Path(log_dir).glob("events.out.*")):
        path.unlink(missing_ok=True)


def same_dimension(spatial_dims: int | None, grid: Grid) -> None:
    """Raises ``InputError`` where the dimension that was asked for is not the data's."""
    if spatial_dims not in (None, len(grid.shape)):
        raise InputError(
            f"--spatial_dims {spatial_dims}, but the data are {len(grid.shape)}D: leave it out, or give other data"
        )

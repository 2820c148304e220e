"""Runs many short trainings, one after another or a few at a time; each writes its result to a file.

A run is the bundle's own training without a process, checks and TensorBoard of its own.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from regpipe.data.load import LoadPair
from regpipe.io.images import Grid
from regpipe.metrics import cost
from regpipe.metrics.measures import mean_of
from regpipe.metrics.metric import columns
from regpipe.networks.weights import save_weights
from regpipe.study import further
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

KEPT = ("NanGuard", "GradientClip", "LrScheduleHandler")  # of train.yaml's list of handlers


class Task(NamedTuple):
    """A run as a worker gets it: configuration files, settings over them, the file of its result."""

    name: str
    configs: Sequence[str]
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    result: Path
    model: Path | None = None


def run_all(tasks: Sequence[Task], jobs: int, after: Callable[[], Any]) -> None:
    """Run the tasks that have no result yet, ``jobs`` at a time; call ``after`` after each."""
    left = [task for task in tasks if not task.result.is_file()]
    if len(left) < len(tasks):
        print(f"{len(tasks) - len(left)} of {len(tasks)} runs are done already", flush=True)
    started = time.monotonic()
    for done, (task, result) in enumerate(_results(left, jobs), 1):
        after()
        minutes = (time.monotonic() - started) / done * (len(left) - done) / 60
        print(
            f"[{done}/{len(left)}] {task.name}: "
            f"Dice {result['metrics']['dice']:.3f} in {result['elapsed']:.0f} s; {minutes:.0f} min left",
            flush=True,
        )
    after()


def _results(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    if jobs == 1:
        for task in tasks:
            yield task, run(task)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch hangs
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker) as pool:
        futures = {pool.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)


def run(task: Task) -> dict[str, Any]:
    """Train and evaluate once, in this process; writes the result, and the weights if the task names a file."""
    begun = time.perf_counter()
    parser = ConfigParser(run_config(task.configs, task.settings))
    set_determinism(seed=task.settings["seed"])
    network = parser.get_parsed_content("network")
    trainer, evaluator = (parser.get_parsed_content(name) for name in ("train::trainer", "validate::evaluator"))
    grid, load = parser.get_parsed_content("grid"), parser.get_parsed_content("load")
    items = [load(case) for case in further.spread(parser.get_parsed_content("validate::pairs"))]
    asked = further.Further(evaluator.network, evaluator.inferer, items, grid.spacing)
    curve = further.Curve(asked)
    curve.attach(trainer)
    trainer.run()
    spent = curve.spent()
    if parser.get_parsed_content("structures_stage").now:
        raise InputError(f"{task.name}: nothing was registered; give more budget_seconds, or less structures_first")
    evaluator.run()
    result = {
        **task.about,
        "steps": trainer.state.iteration,
        **spent,
        **_cost(network, grid),
        "further": {**asked.changed(), **asked.refined()},
        "curve": curve.points,
        **_measured(evaluator.state.metric_details["cases"]),
        "elapsed": time.perf_counter() - begun,
    }
    if task.model:
        save_weights(task.model, evaluator.network)
    replace_file(task.result, json.dumps(result).encode())
    return result


def run_config(configs: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run: ``train.yaml`` and overlays without logging, validation and checkpoints.

    Each epoch has ``pairs_per_epoch`` pairs; if there are fewer, permutations of them follow one another.
    """
    config = ConfigParser.load_config_files(list(configs))
    config["train"]["handlers"] = [h for h in config["train"]["handlers"] if h["_target_"].endswith(KEPT)]
    config["train"]["sampler"]["again"] = True
    config["validate"]["handlers"] = []
    config["load"]["_target_"] = "regpipe.study.runs.loader"
    return {**config, **settings}


@functools.lru_cache(maxsize=2)
def loader(grid: Grid, **options: Any) -> LoadPair:
    """``LoadPair(grid, **options)``, shared by the runs of this process: it keeps the images in memory."""
    return LoadPair(grid, **options)


def _cost(network: torch.nn.Module, grid: Grid) -> dict[str, Any]:
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    about = {"parameters": cost.parameters(network), "trainable": trainable}
    return {**about, "gflop": cost.flops(network, grid.shape) / 1e9}


def _measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means, and values per case in the order of the held-out pairs; NaN where a case has none."""
    cases = {name: [row[name] for row in rows] for name in columns()}
    return {"metrics": {name: mean_of(values) for name, values in cases.items()}, "cases": cases}

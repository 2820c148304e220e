"""The tables of a study: a line per run, and the differences between kinds of run, with intervals."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.metrics.metric import columns
from regpipe.report.figures import TRANSFERS
from regpipe.utils.files import replace_file

Run = dict[str, Any]  # what ``study.runs.run`` returns
CELL = ("dims", "backbone", "transfer", "subjects", "seed")
KIND = ("backbone", "transfer", "subjects")  # runs of one kind differ in their seed
COSTS = ("steps", "seconds", "cpu_seconds", "parameters", "trainable", "gflop")
LEVEL = "dice"  # in ``effects.csv``: a mean Dice and no difference
DRAWS = 2000


def read_runs(out: Path) -> list[Run]:
    """The finished runs of a study's folder, 2D before 3D, in the order of their names."""
    found = sorted(out.glob("[23]d/runs/*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    return sorted(runs, key=lambda run: [run[name] for name in ("dims", "subjects", "seed")])


def write_runs(out: Path) -> None:
    """``study.csv``: one line per finished run; a metric that an older version did not keep is left out."""
    runs, lines = read_runs(out), []
    metrics = [name for name in columns() if all(name in run["metrics"] for run in runs)]
    for run in runs:
        numbers = [*(run["metrics"][name] for name in metrics), *(run[name] for name in COSTS)]
        lines.append([*(run[name] for name in CELL), len(run["cases"]["dice"]), *map(float, numbers)])
    _write(out / "study.csv", [*CELL, "pairs", *metrics, *COSTS], lines)


def write_effects(out: Path) -> None:
    """``effects.csv``: the Dice of each kind of run, and the differences between kinds."""
    runs, rows = read_runs(out), []
    for dims in sorted({run["dims"] for run in runs}):
        mine = [run for run in runs if run["dims"] == dims]
        ends = json.loads((out / f"{dims}d" / "study.json").read_text())["held_out"]
        rows += [(dims, *effect) for effect in [*levels(mine, ends), *effects(mine, ends)]]
    _write(out / "effects.csv", ["dims", *Effect._fields], rows)


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(head)
    lines.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    replace_file(path, text.getvalue().encode())


class Effect(NamedTuple):
    """A mean difference of Dice, or a mean Dice, and its interval: a line of ``effects.csv`` after the dimension."""

    effect: str  # "frozen - scratch", "resnet18 - plain"; LEVEL
    backbone: str
    transfer: str
    subjects: int
    seeds: int
    mean: float
    low: float
    high: float


def effects(runs: Sequence[Run], ends: Sequence[Sequence[str]]) -> list[Effect]:
    """Transfer against scratch, and each backbone against ``plain``, per number of subjects, where both were run.

    Args:
        runs: of one dimension.
        ends: of each held-out pair its moving and its fixed subject.
    """
    asked = [("transfer", kind, "scratch") for kind in TRANSFERS if kind != "scratch"]
    asked += [("backbone", name, "plain") for name in ("resnet18", "vgg16", "alexnet")]
    found = []
    for axis, kind, reference in asked:
        for cell in dict.fromkeys(_kind(run) for run in runs if run[axis] == kind):
            mine, other = (_by_seed(runs, {**dict(cell), axis: value}) for value in (kind, reference))
            seeds = sorted(mine.keys() & other.keys())
            if seeds:
                a, b = (np.array([side[seed] for seed in seeds], dtype=float) for side in (mine, other))
                backbone, transfer, size = (value for _, value in cell)
                found.append(Effect(f"{kind} - {reference}", backbone, transfer, size, len(seeds), *paired(a, b, ends)))
    return found


def levels(runs: Sequence[Run], ends: Sequence[Sequence[str]]) -> list[Effect]:
    """Mean Dice of each kind of run; arguments as for ``effects``."""
    found = []
    for cell in dict.fromkeys(_kind(run) for run in runs):
        dice = np.array([*_by_seed(runs, dict(cell)).values()], dtype=float)
        backbone, transfer, size = (value for _, value in cell)
        found.append(Effect(LEVEL, backbone, transfer, size, len(dice), *paired(dice, np.zeros_like(dice), ends)))
    return found


def _kind(run: Run) -> tuple[tuple[str, Any], ...]:
    return tuple((name, run[name]) for name in KIND)


def _by_seed(runs: Iterable[Run], kind: dict[str, Any]) -> dict[int, list[float]]:
    """seed -> Dice per held-out pair of the runs of a kind."""
    return {run["seed"]: run["cases"]["dice"] for run in runs if dict(_kind(run)) == kind}


def paired(
    a: np.ndarray, b: np.ndarray, ends: Sequence[Sequence[str]], *, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Mean, low, high of a - b, both (seeds, pairs), by the pigeonhole bootstrap (Owen 2007).

    Each draw takes seeds and, independently, subjects with replacement; ``study.page.HOW`` says it to readers.
    Pairs with NaN are left out.
    """
    names, index = np.unique(np.array(ends), return_inverse=True)
    moving, fixed = index.reshape(-1, 2).T
    difference = a - b
    kept = ~np.isnan(difference).any(0)
    difference, moving, fixed = difference[:, kept], moving[kept], fixed[kept]
    rng = np.random.default_rng(0)
    seeds, subjects = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in (len(difference), len(names)))
    pairs = subjects[:, moving] * subjects[:, fixed]  # (draws, pairs)
    weight = seeds.sum(1) * pairs.sum(1)
    drawn = np.einsum("ds,sp,dp->d", seeds, difference, pairs, optimize=True)[weight > 0] / weight[weight > 0]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(difference.mean()), float(low), float(high)

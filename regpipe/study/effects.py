"""The tables of a study: a line per run, and the differences between kinds of run, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from regpipe.metrics.metric import columns
from regpipe.networks.encoders import TRANSFERRED
from regpipe.report.figures import TRANSFERS
from regpipe.study.further import FURTHER
from regpipe.utils.files import csv_bytes, replace_file

Run = dict[str, Any]  # what ``study.runs.run`` returns
CELL = ("dims", "backbone", "transfer", "subjects", "seed")
KIND = ("backbone", "transfer", "subjects")  # runs of one kind differ in their seed
COSTS = ("steps", "seconds", "cpu_seconds", "parameters", "trainable", "gflop")
# Depth and features at all; depth within a family, of which all else is the same.
BACKBONES_COMPARED = (
    *((name, "plain") for name in TRANSFERRED),
    *((name, "pooled") for name in (*TRANSFERRED, "plain")),
    ("vgg16_8", "vgg16_4"),
    ("vgg16", "vgg16_8"),
)
ALL = "all"  # in ``effects.csv``: the mean over the backbones
SOON, ENOUGH = ("steps_95", "cpu_seconds_95"), 0.95
LEVEL = "dice"  # in ``effects.csv``: a mean Dice and no difference
DRAWS = 4000


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
        numbers = [run["metrics"][name] for name in metrics]
        scratch = next((r for r in runs if _cell(r) == {**_cell(run), "transfer": "scratch"}), run)
        numbers += [*(run[name] for name in COSTS), *soon(run["curve"], scratch["curve"])]
        numbers += [run["further"][name] for name in FURTHER]
        lines.append([*(run[name] for name in CELL), len(run["cases"]["dice"]), *map(float, numbers)])
    _write(out / "study.csv", [*CELL, "pairs", *metrics, *COSTS, *SOON, *FURTHER], lines)


def _cell(run: Run) -> dict[str, Any]:
    return {name: run[name] for name in CELL}


def soon(curve: Sequence[Sequence[float]], goal: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Steps and processor seconds until a run has ``ENOUGH`` of what ``goal`` gains in the end; NaN where it never has.

    Both are ``study.further.Curve.points``; the goal is that of the same training from scratch.
    """
    before, last = goal[0][2], goal[-1][2]
    for steps, seconds, dice in curve[1:]:
        if dice >= before + ENOUGH * (last - before):
            return steps, seconds
    return math.nan, math.nan


def write_effects(out: Path) -> None:
    """``effects.csv``: the Dice of each kind of run, and the differences between kinds."""
    runs, rows = read_runs(out), []
    for dims in sorted({run["dims"] for run in runs}):
        mine = [run for run in runs if run["dims"] == dims]
        ends = json.loads((out / f"{dims}d" / "study.json").read_text())["held_out"]
        rows += [(dims, *effect) for effect in [*levels(mine, ends), *effects(mine, ends)]]
    _write(out / "effects.csv", ["dims", *Effect._fields], rows)


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    rounded = ([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    replace_file(path, csv_bytes([head, *rounded]))


class Effect(NamedTuple):
    """A mean difference of Dice, or a mean Dice, and its interval: a line of ``effects.csv`` after the dimension."""

    effect: str  # "frozen - scratch", "resnet18 - plain"; LEVEL
    backbone: str
    transfer: str
    subjects: int
    seeds: int
    mean: float
    low: float  # 95 %
    high: float
    low90: float
    high90: float
    p: float  # of no difference; NaN where no other seed tells how much chance does


class Estimate(NamedTuple):
    """A difference, and what chance may have done to it."""

    mean: float
    by_seed: np.ndarray  # (seeds,), the mean of each
    error: float  # standard error of the mean over subjects


def effects(runs: Sequence[Run], ends: Sequence[Sequence[str]]) -> list[Effect]:
    """Transfer against scratch, backbones against each other, per number of subjects, where both were run.

    Transfer against scratch also as the mean over the backbones that have both: ``ALL``.

    Args:
        runs: of one dimension.
        ends: of each held-out pair its moving and its fixed subject.
    """
    asked = [("transfer", kind, "scratch") for kind in TRANSFERS if kind != "scratch"]
    asked += [("backbone", *both) for both in BACKBONES_COMPARED]
    found: dict[tuple[str, str, str, int], Estimate] = {}
    of_all: dict[tuple[str, int], list[dict[int, np.ndarray]]] = {}
    for axis, kind, reference in asked:
        for cell in dict.fromkeys(_kind(run) for run in runs if run[axis] == kind):
            mine, other = (_by_seed(runs, {**dict(cell), axis: value}) for value in (kind, reference))
            seeds = sorted(mine.keys() & other.keys())
            if seeds:
                values = {seed: np.subtract(mine[seed], other[seed], dtype=float) for seed in seeds}
                backbone, transfer, size = (value for _, value in cell)
                found[f"{kind} - {reference}", backbone, transfer, size] = estimate([*values.values()], ends)
                if axis == "transfer":
                    of_all.setdefault((kind, size), []).append(values)
    means = {}
    for (kind, size), each in of_all.items():
        seeds = sorted(set.intersection(*map(set, each)))
        if len(each) > 1 and seeds:
            values = {seed: np.mean([values[seed] for values in each], axis=0) for seed in seeds}
            means[f"{kind} - scratch", ALL, kind, size] = estimate([*values.values()], ends)
    return [*with_intervals(means), *with_intervals(found)]


def levels(runs: Sequence[Run], ends: Sequence[Sequence[str]]) -> list[Effect]:
    """Mean Dice of each kind of run; arguments as for ``effects``."""
    found = {}
    for cell in dict.fromkeys(_kind(run) for run in runs):
        backbone, transfer, size = (value for _, value in cell)
        found[LEVEL, backbone, transfer, size] = estimate([*_by_seed(runs, dict(cell)).values()], ends)
    return with_intervals(found)


def _kind(run: Run) -> tuple[tuple[str, Any], ...]:
    return tuple((name, run[name]) for name in KIND)


def _by_seed(runs: Iterable[Run], kind: dict[str, Any]) -> dict[int, Any]:
    """seed -> Dice per held-out pair of the runs of a kind."""
    return {run["seed"]: run["cases"]["dice"] for run in runs if dict(_kind(run)) == kind}


def estimate(given: ArrayLike, ends: Sequence[Sequence[str]], *, draws: int = DRAWS) -> Estimate:
    """Of values (seeds, pairs); pairs with a NaN are left out.

    The error over subjects is that of draws of subjects with replacement, in which a pair counts as often as the
    product of its two subjects' counts says (the pigeonhole bootstrap, Owen 2007): pairs that share a subject are not
    independent.
    """
    names, index = np.unique(np.array(ends), return_inverse=True)
    moving, fixed = index.reshape(-1, 2).T
    values = np.array(given, dtype=float)
    kept = ~np.isnan(values).any(0)
    values, moving, fixed = values[:, kept], moving[kept], fixed[kept]
    if not kept.any():
        return Estimate(math.nan, values.sum(1) * math.nan, math.nan)
    subjects = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    pairs = subjects[:, moving] * subjects[:, fixed]  # (draws, pairs)
    weight = pairs.sum(1)
    drawn = (pairs @ values.mean(0))[weight > 0] / weight[weight > 0]
    return Estimate(float(values.mean()), values.mean(1), float(drawn.std()) if len(drawn) else math.nan)


def with_intervals(found: Mapping[tuple[str, str, str, int], Estimate]) -> list[Effect]:
    """Intervals and p by Student's t. ``study.page.HOW`` says it to readers.

    Three seeds say little of how much seeds differ: their variance is pooled over all estimates with as many subjects.
    Half of it is of the runs that differences share, which has the degrees of freedom of one difference: four times
    those are what it has in all, at most (Satterthwaite 1946).

    Args:
        found: effect, backbone, transfer and subjects -> estimate.
    """
    rows = []
    for names, e in found.items():
        alike = [other.by_seed for (*_, subjects), other in found.items() if subjects == names[-1]]
        alike = [x for x in alike if len(x) > 1 and np.isfinite(x).all()]
        freedom = sum(len(x) - 1 for x in alike)
        between = sum(float(x.var() * len(x)) for x in alike) / freedom if freedom else 0.0
        error = math.sqrt(between / len(e.by_seed) + e.error**2)
        t = stats.t(min(freedom, 4 * (max(map(len, alike)) - 1)) if freedom else math.inf)
        reach, reach90 = error * t.ppf(0.975), error * t.ppf(0.95)
        p = float(2 * t.sf(abs(e.mean) / max(error, 1e-12))) if freedom else math.nan
        low, high, low90, high90 = (float(e.mean + r) for r in (-reach, reach, -reach90, reach90))
        rows.append(Effect(*names, len(e.by_seed), e.mean, low, high, low90, high90, p))
    return rows

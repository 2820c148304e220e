"""What a study found: one CSV, effects with intervals, plots, and a page of tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from regpipe.evaluation import interval
from regpipe.files import replace_file
from regpipe.studyrun import METRICS

Run = dict[str, Any]  # what ``regpipe.studyrun.run`` returns
CELL = ("dims", "backbone", "transfer", "subjects", "seed")
COSTS = ("steps", "seconds", "cpu_seconds", "parameters", "trainable", "gflop")
COLOURS = {"scratch": "#555555", "frozen": "#1f77b4", "finetuned": "#d95f02"}
MARKERS = {"resnet18": "o", "vgg16": "s", "alexnet": "^", "plain": "D"}
HOW = """Dice is the mean over the held-out pairs of each run's last weights; in brackets the lowest and the highest of
the seeds. An effect is the mean difference between two kinds of run over seeds and held-out pairs, the same pairs and
seeds on both sides, with its 95 % percentile interval of {draws} bootstrap draws. Each draw takes seeds with
replacement and, independently, held-out subjects with replacement; a pair counts as often as the product of its two
subjects' counts says (the pigeonhole bootstrap, Owen 2007), because pairs that share a subject are not independent.
With three seeds an interval says little about other seeds: look at the brackets too."""
DRAWS = 2000


def read_runs(out: Path) -> list[Run]:
    """The finished runs of a study's folder, 2D before 3D, in the order of their names."""
    found = sorted(out.glob("[23]d/runs/*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    return sorted(runs, key=lambda run: [run[name] for name in ("dims", "subjects", "seed")])


def write_csv(out: Path) -> None:
    """``study.csv``: one line per run."""
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow([*CELL, *METRICS, *COSTS])
    for run in read_runs(out):
        numbers = [*(run["metrics"][name] for name in METRICS), *(run[name] for name in COSTS)]
        lines.writerow([*(run[name] for name in CELL), *(f"{number:.6g}" for number in numbers)])
    replace_file(out / "study.csv", text.getvalue().encode())


def write_page(out: str | Path) -> str:
    """Write ``study.csv``, ``study.md``, ``effects.csv`` and the plots of what is done so far; returns the page."""
    out = Path(out)
    runs = read_runs(out)
    write_csv(out)
    parts, rows = [], []
    for dims in sorted({run["dims"] for run in runs}):
        mine = [run for run in runs if run["dims"] == dims]
        ends = json.loads((out / f"{dims}d" / "study.json").read_text())["held_out"]
        found = effects(mine, ends)
        rows += [(dims, *effect) for effect in found]
        save_figure(dice_figure(mine), out / f"dice_{dims}d")
        save_figure(cost_figure(mine), out / f"cost_{dims}d")
        parts += [_section(dims, mine, found, len(ends))]
    page = "\n\n".join([*parts, HOW.format(draws=DRAWS)]) + "\n"
    replace_file(out / "study.md", page.encode())
    head = "dims,effect,backbone,transfer,subjects,seeds,mean,low,high"
    lines = [",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) for row in rows]
    replace_file(out / "effects.csv", ("\n".join([head, *lines]) + "\n").encode())
    return page


# ------------------------------------------------------------------------------ effects


class Effect(NamedTuple):
    """A mean difference of Dice and its interval."""

    effect: str  # "frozen - scratch", "resnet18 - plain"
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
    asked = [("transfer", kind, "scratch") for kind in ("frozen", "finetuned")]
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


def _kind(run: Run) -> tuple[tuple[str, Any], ...]:
    return tuple((name, run[name]) for name in ("backbone", "transfer", "subjects"))


def _by_seed(runs: Iterable[Run], kind: dict[str, Any]) -> dict[int, list[float]]:
    """seed -> Dice per held-out pair of the runs of a kind."""
    return {run["seed"]: run["cases"]["dice"] for run in runs if dict(_kind(run)) == kind}


def paired(
    a: np.ndarray, b: np.ndarray, ends: Sequence[Sequence[str]], *, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Mean, low, high of a - b, both (seeds, pairs): see ``HOW``. Pairs with NaN are left out."""
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


# ------------------------------------------------------------------------------ tables


def _section(dims: int, runs: Sequence[Run], found: Sequence[Effect], pairs: int) -> str:
    before = np.nanmean(runs[0]["cases"]["dice_before"])
    about = f"{pairs} held-out pairs, {runs[0]['steps']} steps a run; Dice before registration {before:.3f}."
    tables = [_dice_table(runs), _cost_table(runs), _effect_table(found)]
    plots = f"![Dice over subjects](dice_{dims}d.svg)\n\n![Dice against cost](cost_{dims}d.svg)"
    return "\n\n".join([f"## {dims}D", about, *(table for table in tables if table), plots])


def _dice_table(runs: Sequence[Run]) -> str:
    sizes = sorted({run["subjects"] for run in runs})
    lines = [["Dice", *(f"{size} subjects" for size in sizes)]]
    for backbone, transfer in _unique(runs, "backbone", "transfer"):
        cells = [_dices(runs, backbone, transfer, size) for size in sizes]
        shown = [interval((sum(c) / len(c), min(c), max(c)), 3) if c else "" for c in cells]
        lines.append([f"{backbone}, {transfer}", *shown])
    return _markdown(lines)


def _dices(runs: Iterable[Run], *kind: Any) -> list[float]:
    """Mean Dice of each seed's run of (backbone, transfer, subjects)."""
    return [run["metrics"]["dice"] for run in runs if tuple(value for _, value in _kind(run)) == kind]


def _cost_table(runs: Sequence[Run]) -> str:
    lines = [["", "parameters M", "trained M", "GFLOP", "training s", "CPU s", "HD95 mm", "SDlogJ", "folds %"]]
    for backbone, transfer in _unique(runs, "backbone", "transfer"):
        mine = [run for run in runs if (run["backbone"], run["transfer"]) == (backbone, transfer)]
        costs = [mine[0]["parameters"] / 1e6, mine[0]["trainable"] / 1e6, mine[0]["gflop"]]
        costs += [np.mean([run[name] for run in mine]) for name in ("seconds", "cpu_seconds")]
        metrics = [np.mean([run["metrics"][name] for run in mine]) for name in ("hd95", "sdlogj", "folds_percent")]
        digits = (2, 2, 2, 1, 1, 2, 3, 4)
        shown = [f"{number:.{n}f}" for number, n in zip([*costs, *metrics], digits, strict=True)]
        lines.append([f"{backbone}, {transfer}", *shown])
    return _markdown(lines)


def _effect_table(found: Sequence[Effect]) -> str:
    lines = [["Dice", "of", "subjects", "seeds", "difference"]]
    for e in found:
        of = e.transfer if e.effect.endswith("plain") else e.backbone
        lines.append([e.effect, of, str(e.subjects), str(e.seeds), interval((e.mean, e.low, e.high), 4)])
    return _markdown(lines) if found else ""


def _unique(runs: Iterable[Run], *names: str) -> list[tuple[Any, ...]]:
    found = {tuple(run[name] for name in names) for run in runs}
    return sorted(found, key=lambda kind: ([*MARKERS].index(kind[0]), [*COLOURS].index(kind[1])))


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


# ------------------------------------------------------------------------------ plots


def dice_figure(runs: Sequence[Run]) -> Figure:
    """Dice over the number of training subjects, a panel per backbone; bars reach over the seeds."""
    backbones = [name for name in MARKERS if any(run["backbone"] == name for run in runs)]
    sizes = sorted({run["subjects"] for run in runs})
    figure = Figure(figsize=(3 * len(backbones), 3.2), layout="constrained")
    panels = figure.subplots(1, len(backbones), sharey=True, squeeze=False)[0]
    for axes, backbone in zip(panels, backbones, strict=True):
        for offset, transfer in enumerate(COLOURS):
            cells = {size: _dices(runs, backbone, transfer, size) for size in sizes}
            _line(axes, {size: c for size, c in cells.items() if c}, transfer, 1 + 0.04 * (offset - 1))
        axes.set(title=backbone, xlabel="training subjects", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Dice, held-out pairs")
    panels[0].legend(frameon=False)
    return figure


def _line(axes: Axes, cells: dict[int, list[float]], transfer: str, aside: float) -> None:
    if not cells:
        return
    x = [size * aside for size in cells]  # bars of the same size beside each other
    means = np.array([np.mean(values) for values in cells.values()])
    reach = np.abs([[f(v) for v in cells.values()] - means for f in (min, max)])  # down, up
    axes.errorbar(x, means, reach, color=COLOURS[transfer], marker="o", markersize=4, capsize=3, label=transfer)


def cost_figure(runs: Sequence[Run]) -> Figure:
    """Dice against the CPU seconds of training, with the largest number of subjects."""
    most = max(run["subjects"] for run in runs)
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for backbone, transfer in _unique([run for run in runs if run["subjects"] == most], "backbone", "transfer"):
        mine = [run for run in runs if tuple(v for _, v in _kind(run)) == (backbone, transfer, most)]
        x, y = np.mean([(run["cpu_seconds"], run["metrics"]["dice"]) for run in mine], axis=0)
        label = f"{backbone}, {transfer}"
        axes.plot(x, y, MARKERS[backbone], color=COLOURS[transfer], label=label, linestyle="none")
    axes.set(xlabel="training, CPU seconds a run", ylabel="Dice, held-out pairs", title=f"{most} training subjects")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """``stem.svg`` and ``stem.png``; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    for suffix in ("svg", "png"):
        data = io.BytesIO()
        with rc_context({"svg.hashsalt": "regpipe", "svg.fonttype": "none"}):
            figure.savefig(data, format=suffix, dpi=128, metadata={"Date": None} if suffix == "svg" else None)
        replace_file(stem.with_suffix(f".{suffix}"), data.getvalue())

"""The page of a study: tables and figures, made of its two CSVs alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from regpipe.engines.evaluation import interval
from regpipe.metrics.measures import mean_of
from regpipe.metrics.metric import METRICS, heading
from regpipe.networks.encoders import BACKBONES, CUT
from regpipe.report import figures
from regpipe.study.effects import ALL, CELL, COSTS, DRAWS, ENOUGH, KIND, LEVEL, SOON, Effect
from regpipe.study.further import EVERY, FURTHER, PAIRS, STEPS
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

PAGE = ("study.md", "*_[23]d.svg", "*_[23]d.png")  # made of the CSVs
MARKUP = re.compile(r"[<>&|`$\[\]\\]")  # not in a name: it would be markup in the page or a figure

BESIDE = ("hd95", "sdlogj", "folds_percent")  # the metrics in the table of costs

Row = dict[str, Any]  # a line of ``study.csv``
Panels = dict[str, dict[str, dict[int, figures.Interval]]]  # as ``figures.curves`` takes them
WORDS = ("effect", "backbone", "transfer")  # columns without numbers
CAPTIONS = {
    "dice": "Dice over the number of training subjects, mean and 95 % interval",
    "transfer": "Difference of Dice that transferred weights make, with 95 % intervals",
    "depth": "Difference of Dice between encoders, with 95 % intervals",
    "cost": "Dice against parameters, GFLOP and processor seconds of training",
}
HOW = """Dice is the mean over the held-out pairs of each run's last weights. An effect is the mean difference between
two kinds of run over seeds and held-out pairs, the same pairs and seeds on both sides. In brackets: 95 % intervals by
Student's t. Their error has two parts: between seeds, a variance pooled over all differences with as many subjects, for
the seeds of one are few; and between held-out subjects, of {draws} bootstrap draws in which a pair counts as often as
the product of its two subjects' counts says (the pigeonhole bootstrap, Owen 2007), for pairs that share a subject are
not independent. The interval of a Dice holds how much subjects differ, which all kinds of run share and a difference
does not hold: two kinds whose intervals overlap may well differ.

`all` is the mean of a difference over the backbones. A difference is `above` or `below` where its p is under 0.05 after
correction for all differences of the table (Holm 1979; those of `all` by themselves, as they were planned); `equal`
where its 90 % interval lies within {margin} Dice (two one-sided tests, Schuirmann 1987); else `open`.

The table of changed looks is of {pairs} held-out pairs: the moving image inverted, its grey values squared, 5 % of
noise in both; refined: of {refined} of them, {steps} steps of the optimiser from the network's answer. Steps and CPU s
are those until a run has {enough:.0%} of what the same training from scratch gains over no registration in the end, of
runs that get there."""
MARGIN = 0.01  # of Dice, below which two kinds of run are as good as each other


def write_page(out: str | Path) -> str:
    """Write ``study.md`` and its figures, from ``study.csv`` and ``effects.csv`` in ``out``; returns the page.

    Raises:
        InputError: one of the two is missing, or not as ``regpipe study`` writes it.
    """
    out = Path(out)
    runs = _read(out / "study.csv", [*CELL, "pairs", "dice_before", *BESIDE, *COSTS, *SOON, *FURTHER])
    found = _read(out / "effects.csv", ["dims", *Effect._fields])
    parts = []
    for dims in sorted({run["dims"] for run in runs}):
        mine = [run for run in runs if run["dims"] == dims]
        here = [Effect(*(row[name] for name in Effect._fields)) for row in found if row["dims"] == dims]
        drawn = {"dice": dice_figure(here), **effect_figures(here), "cost": cost_figure(mine, here)}
        for stem, figure in drawn.items():
            figures.save(figure, out / f"{stem}_{dims}d")
        parts.append(_section(dims, mine, here, list(drawn)))
    about = {"draws": DRAWS, "margin": MARGIN, "enough": ENOUGH}
    how = HOW.format(**about, pairs=PAIRS, refined=PAIRS // EVERY, steps=STEPS)
    page = "\n\n".join([*parts, how]) + "\n"
    replace_file(out / "study.md", page.encode())
    return page


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    if not path.is_file():
        raise InputError(f"{path}: missing; regpipe study writes it, beside the other CSV")
    with path.open(newline="", encoding="utf-8") as stream:
        lines = csv.DictReader(stream)
        absent = [name for name in columns if name not in (lines.fieldnames or ())]
        if absent:
            raise InputError(f"{path}: has no column {', '.join(absent)}; take the file as regpipe study writes it")
        try:
            return [
                {name: _word(line[name]) if name in WORDS else _number(line[name]) for name in columns}
                for line in lines
            ]
        except (ValueError, TypeError, AttributeError) as cause:
            raise InputError(
                f"{path}: line {lines.line_num}: {cause}; take the file as regpipe study writes it"
            ) from cause


def _word(text: str) -> str:
    if MARKUP.search(text):
        raise ValueError(f"{text!r} is no name")
    return text


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


# ------------------------------------------------------------------------------ tables


def _section(dims: int, runs: Sequence[Row], found: Sequence[Effect], drawn: Sequence[str]) -> str:
    first = runs[0]
    about = f"{first['pairs']} held-out pairs, {first['steps']:.0f} steps a run; "
    about += f"Dice before registration {first['dice_before']:.3f}."
    shown = [f"![{CAPTIONS[stem]}]({stem}_{dims}d.svg)" for stem in drawn]
    tables = [_dice_table(found), _cost_table(runs), _further_table(runs), _effect_table(found)]
    return "\n\n".join([f"## {dims}D", about, *(table for table in tables if table), *shown])


def _levels(found: Iterable[Effect]) -> dict[tuple[str, str], dict[int, figures.Interval]]:
    """(backbone, transfer) -> subjects -> Dice with its interval."""
    lines: dict[tuple[str, str], dict[int, figures.Interval]] = {}
    for e in found:
        if e.effect == LEVEL:
            lines.setdefault((e.backbone, e.transfer), {})[e.subjects] = (e.mean, e.low, e.high)
    return {kind: lines[kind] for kind in sorted(lines, key=_order)}


def _order(kind: tuple[str, str]) -> tuple[int, int]:
    return [*BACKBONES, *CUT, ALL].index(kind[0]), [*figures.TRANSFERS].index(kind[1])


def _dice_table(found: Sequence[Effect]) -> str:
    lines = _levels(found)
    sizes = sorted({size for line in lines.values() for size in line})
    rows = [["Dice", *(f"{size} subjects" for size in sizes)]]
    for kind, line in lines.items():
        rows.append([", ".join(kind), *(interval(line[size], 3) if size in line else "" for size in sizes)])
    return _markdown(rows)


def _cost_table(runs: Sequence[Row]) -> str:
    lines = [["", "parameters M", "trained M", "GFLOP", "training s", "CPU s", *map(heading, BESIDE)]]
    for backbone, transfer in sorted({(run["backbone"], run["transfer"]) for run in runs}, key=_order):
        mine = [run for run in runs if (run["backbone"], run["transfer"]) == (backbone, transfer)]
        numbers = [mine[0]["parameters"] / 1e6, mine[0]["trainable"] / 1e6, mine[0]["gflop"]]
        numbers += [np.mean([run[name] for run in mine]) for name in ("seconds", "cpu_seconds", *BESIDE)]
        digits = (2, 2, 2, 1, 1, *(METRICS[name].digits for name in BESIDE))
        shown = [f"{number:.{n}f}" for number, n in zip(numbers, digits, strict=True)]
        lines.append([f"{backbone}, {transfer}", *shown])
    return _markdown(lines)


def _further_table(runs: Sequence[Row]) -> str:
    """Means over seeds, with the most subjects."""
    most = max(run["subjects"] for run in runs)
    names = {"steps_95": "steps", "cpu_seconds_95": "CPU s", "dice_unchanged": "Dice"}
    names |= {"dice_inverted": "inverted", "dice_gamma": "squared", "dice_noise": "noise"}
    names |= {"dice_unrefined": f"{PAIRS // EVERY} pairs", "dice_refined": "refined", "sdlogj_refined": "its SDlogJ"}
    lines = [[f"{most} subjects", *(names[name] for name in (*SOON, *FURTHER))]]
    for kind in sorted({(run["backbone"], run["transfer"]) for run in runs if run["subjects"] == most}, key=_order):
        mine = [run for run in runs if (run["backbone"], run["transfer"], run["subjects"]) == (*kind, most)]
        means = [mean_of(run[name] for run in mine) for name in (*SOON, *FURTHER)]
        lines.append([", ".join(kind), *(f"{x:.{n}f}" for x, n in zip(means, (0, 1, *[3] * 7), strict=True))])
    return _markdown(lines)


def _effect_table(found: Sequence[Effect]) -> str:
    lines = [["Dice", "of", "subjects", "seeds", "difference", ""]]
    differences = [e for e in found if e.effect != LEVEL]
    planned, others = ([e for e in differences if (e.backbone == ALL) == first] for first in (True, False))
    for e, verdict in zip([*planned, *others], [*verdicts(planned), *verdicts(others)], strict=True):
        shown = interval((e.mean, e.low, e.high), 4)
        lines.append([e.effect, _of(e), str(e.subjects), str(e.seeds), shown, verdict])
    return _markdown(lines) if len(lines) > 1 else ""


def verdicts(differences: Sequence[Effect]) -> list[str]:
    """``above``, ``below``, ``equal`` or ``open`` of each, as ``HOW`` says."""
    left, differs = sum(e.p == e.p for e in differences), set()  # NaN: nothing is known of chance
    for i in sorted((i for i, e in enumerate(differences) if e.p == e.p), key=lambda i: differences[i].p):
        if left * differences[i].p >= 0.05:
            break
        differs.add(i)
        left -= 1
    signs = ["above" if e.mean > 0 else "below" for e in differences]
    within = ["equal" if e.low90 > -MARGIN and e.high90 < MARGIN else "open" for e in differences]
    return [sign if i in differs else other for i, (sign, other) in enumerate(zip(signs, within, strict=True))]


def _between_transfers(e: Effect) -> bool:
    return e.effect.partition(" - ")[0] in figures.TRANSFERS


def _of(e: Effect) -> str:
    """The property that both sides of a difference share."""
    return e.backbone if _between_transfers(e) else e.transfer


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


# ------------------------------------------------------------------------------ figures


def dice_figure(found: Sequence[Effect]) -> Figure:
    """Dice over the number of training subjects, a panel per backbone, a line per transfer."""
    panels: Panels = {}
    for (backbone, transfer), line in _levels(found).items():
        panels.setdefault(backbone, {})[transfer] = line
    return figures.curves(panels, ylabel="Dice, held-out pairs", columns=2)


def effect_figures(found: Sequence[Effect]) -> dict[str, Figure]:
    """``transfer``: against scratch; ``depth``: backbones against each other; what was not compared is left out."""
    asked: dict[str, Panels] = {"transfer": {}, "depth": {}}
    for e in sorted((e for e in found if e.effect != LEVEL), key=lambda e: _order((e.backbone, e.transfer))):
        panels = asked["transfer" if _between_transfers(e) else "depth"]
        panels.setdefault(e.effect, {}).setdefault(_of(e), {})[e.subjects] = (e.mean, e.low, e.high)
    label = "difference of Dice"
    return {
        name: figures.curves(panels, ylabel=label, columns=min(len(panels), 4), zero=True)
        for name, panels in asked.items()
        if panels
    }


def cost_figure(runs: Sequence[Row], found: Sequence[Effect]) -> Figure:
    """Dice against what it costs, with the largest number of subjects."""
    most = max(run["subjects"] for run in runs)
    points = []
    for (backbone, transfer), line in _levels(found).items():
        if most in line:
            mine = [run for run in runs if tuple(run[name] for name in KIND) == (backbone, transfer, most)]
            costs = {
                "parameters, millions": mine[0]["parameters"] / 1e6,
                "GFLOP a pair": mine[0]["gflop"],
                "training, processor s": float(np.mean([run["cpu_seconds"] for run in mine])),
            }
            points.append(figures.Point(backbone, costs, line[most], transfer))
    return figures.cost(points, ylabel=f"Dice, {most} training subjects")

"""Figures for a paper, as SVG and PNG; the same numbers give the same bytes.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; markers and dashes say the same as the
colours. Sizes are inches: a page of two columns is 7.2 wide.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from regpipe.networks.encoders import BACKBONES, CUT
from regpipe.utils.files import replace_file

PAGE = 7.2
STYLE: Any = {  # matplotlib names its parameters in a type of its own
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": "cycler('color', ['#0072B2', '#D55E00', '#009E73', '#CC79A7'])",
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "regpipe",
}
DOTS_PER_INCH = 300
# Colour, dashes and mark of a line; of backbones in the order of ``BACKBONES`` and ``CUT``, then over again.
TRANSFERS = {
    "scratch": ("#000000", "-", "o"),
    "frozen": ("#0072B2", "--", "s"),
    "finetuned": ("#D55E00", "-.", "^"),
    "imagenet-frozen": ("#56B4E9", ":", "D"),
    "imagenet-finetuned": ("#E69F00", "-", "v"),
    "shipped-frozen": ("#009E73", "--", "P"),
    "shipped-finetuned": ("#CC79A7", "-.", "X"),
    "shipped-network": ("#999933", "-", "*"),
}
LOOKS = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#000000", ":", "D"),
    ("#CC79A7", "-", "v"),
    ("#E69F00", "--", "P"),
    ("#56B4E9", "-.", "X"),
    ("#000000", "-", "*"),
)


def look(name: str) -> dict[str, str]:
    """Of a line, by its name: a kind of transfer, or a backbone."""
    values = TRANSFERS[name] if name in TRANSFERS else LOOKS[[*BACKBONES, *CUT, "all"].index(name) % len(LOOKS)]
    return dict(zip(("color", "linestyle", "marker"), values, strict=True))


Interval = tuple[float, float, float]  # mean, low, high


class Point(NamedTuple):
    """A kind of run in a figure of cost against accuracy."""

    backbone: str
    costs: Mapping[str, float]  # label of the axis -> value
    value: Interval
    transfer: str = "scratch"


def save(figure: Figure, stem: Path) -> None:
    """``stem.svg`` and ``stem.png``; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    for suffix in ("svg", "png"):
        data = io.BytesIO()
        with rc_context(STYLE):
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(data, format=suffix, dpi=DOTS_PER_INCH, metadata=metadata)
        replace_file(stem.with_suffix(f".{suffix}"), data.getvalue())


def intervals(panels: Mapping[str, Mapping[str, Interval]], *, before: Mapping[str, float]) -> Figure:
    """A panel per metric, a line per backbone: mean and interval; dotted: the mean before registration.

    Args:
        panels: the metric with its unit -> backbone -> interval.
        before: the metric with its unit -> mean before, where it is known.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    with rc_context(STYLE):
        width = min(PAGE, 1 + 1.55 * len(panels))
        figure = Figure(figsize=(width, 0.7 + 0.25 * len(names)), layout="constrained")
        for axes, (title, panel) in zip(_panels(figure, len(panels), columns=len(panels)), panels.items(), strict=True):
            for place, name in enumerate(names):
                if name in panel:
                    mean, low, high = panel[name]
                    reach = [[max(mean - low, 0)], [max(high - mean, 0)]]
                    mark: dict[str, Any] = {**look(name), "linestyle": "none"}
                    axes.errorbar(mean, place, xerr=reach, **mark)
            if title in before:
                axes.axvline(before[title], color="#777777", linestyle=":")
            axes.set(xlabel=title)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.grid(axis="x")
    return figure


def cost(points: Sequence[Point], *, ylabel: str) -> Figure:
    """Accuracy with its interval against each cost, where that is known: up and to the left is better."""
    transfers = [name for name in TRANSFERS if any(point.transfer == name for point in points)]
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
        row = _panels(figure, len(points[0].costs), columns=3)
        for axes, label in zip(row, points[0].costs, strict=True):
            values = [point.costs[label] for point in points]
            most = max(filter(math.isfinite, values), default=1)
            for point, value in zip(points, values, strict=True):
                turn = transfers.index(point.transfer) - (len(transfers) - 1) / 2
                aside = 0.02 * most * turn if values.count(value) > 1 else 0  # intervals of one cost
                _upright(axes, [value + aside], [point.value], _look(point, transfers))
            axes.set(xlabel=label)
            axes.set_xlim(0, 1.08 * most)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid()
        row[0].set_ylabel(ylabel)
        _cost_legend(figure, points, transfers)
    return figure


def _look(point: Point, transfers: Sequence[str]) -> dict[str, Any]:
    """A mark for each backbone; a colour for each transfer where there are several, else for each backbone."""
    color = look(point.transfer)["color"] if len(transfers) > 1 else look(point.backbone)["color"]
    return {**look(point.backbone), "color": color, "linestyle": "none"}


def _cost_legend(figure: Figure, points: Sequence[Point], transfers: Sequence[str]) -> None:
    several = len(transfers) > 1
    handles = []
    for name in dict.fromkeys(point.backbone for point in points):
        color = "#777777" if several else look(name)["color"]
        handles.append(Line2D([], [], marker=look(name)["marker"], color=color, linestyle="none", label=name))
    if several:
        handles += [Line2D([], [], color=look(name)["color"], linewidth=4, label=name) for name in transfers]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def curves(
    panels: Mapping[str, Mapping[str, Mapping[int, Interval]]], *, ylabel: str, columns: int, zero: bool = False
) -> Figure:
    """A panel per title, a line per kind of run with its intervals, over the number of training subjects.

    Args:
        panels: title -> a name that ``look`` knows -> subjects -> interval.
        ylabel: what is shown, with its unit.
        columns: panels beside each other.
        zero: draw the line at 0, for differences.
    """
    sizes = sorted({size for panel in panels.values() for line in panel.values() for size in line})
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 0.4 + 1.9 * -(-len(panels) // columns)), layout="constrained")
        cells = _panels(figure, len(panels), columns=columns)
        for axes, (title, panel) in zip(cells, panels.items(), strict=True):
            for turn, (name, line) in enumerate(panel.items()):
                aside = 1 + 0.06 * (turn - (len(panel) - 1) / 2)  # intervals of the same size beside each other
                _upright(axes, [size * aside for size in line], [*line.values()], {**look(name), "label": name})
            if zero:
                axes.axhline(0, color="#777777", linewidth=0.6)
            axes.set(title=title, xlabel="training subjects", xscale="log")
            axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y")
        for axes in cells[::columns]:
            axes.set_ylabel(ylabel)
        handles = {label: h for axes in cells for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return figure


def _upright(axes: Axes, x: Sequence[float], values: Sequence[Interval], look: Mapping[str, Any]) -> None:
    """Means with upright intervals, joined where the look has a line."""
    mean, low, high = np.array(values).T
    reach = np.maximum([mean - low, high - mean], 0)
    axes.errorbar(x, mean, reach, elinewidth=0.7, **look)


def _panels(figure: Figure, count: int, *, columns: int) -> list[Axes]:
    """``count`` axes in rows, which share the values upwards."""
    rows = -(-count // columns)
    cells = figure.subplots(rows, min(columns, count), sharey=True, squeeze=False).flat
    for axes in cells[count:]:
        axes.remove()
    return list(cells[:count])

"""The page of a comparison: one CSV, and a table and figures made of it alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from regpipe.engines.evaluation import interval, table
from regpipe.metrics.metric import columns, heading, key_metric, shown_in
from regpipe.networks.encoders import BACKBONES
from regpipe.report import figures
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

NAME = "comparison.csv"
PAGE = ("comparison.md", "comparison_*.svg", "comparison_*.png")  # made of the CSV
COSTS = ("seconds/pair", "parameters M", "GFLOP", "peak memory GiB", "training min")
COUNTS = ("parameters", "flops", "peak_memory_bytes", "training_seconds")  # a number each, without an interval
CAPTIONS = {
    "accuracy": "Means with 95 % intervals over cases; dotted: before registration",
    "cost": "Accuracy against parameters, GFLOP and seconds a pair",
}


Results = dict[str, dict[str, Any]]  # backbone -> what its summary.json says


def write_csv(out: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """``comparison.csv``: a line per backbone and metric, with mean and interval."""
    lines = ["backbone,metric,mean,low,high"]
    for name, result in results.items():
        for metric in [m for m in columns("table") if m in result["metrics"]]:
            lines.append(f"{name},{metric}," + ",".join(f"{v:.6g}" for v in result["metrics"][metric]))
        lines.append(f"{name},seconds_per_pair," + ",".join(f"{v:.6g}" for v in result["seconds_per_pair"]))
        for cost in COUNTS:
            lines.append(f"{name},{cost},{result[cost] or math.nan:.6g},,")
    replace_file(out / NAME, ("\n".join(lines) + "\n").encode())


def read_csv(out: Path) -> Results:
    """What ``write_csv`` wrote.

    Raises:
        InputError: the file is missing, or is not what ``write_csv`` writes.
    """
    path, results = out / NAME, Results()
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for line in csv.DictReader(stream):
                if line["backbone"] not in BACKBONES:
                    raise ValueError(f"backbone {line['backbone']!r} is none of {', '.join(BACKBONES)}")
                result = results.setdefault(line["backbone"], {"metrics": {}})
                if line["metric"] in COUNTS:
                    result[line["metric"]] = float(line["mean"])
                    continue
                value = [float(line[end]) for end in ("mean", "low", "high")]
                place = result if line["metric"] == "seconds_per_pair" else result["metrics"]
                place[line["metric"]] = value
        if not all(key_metric(result["metrics"]) and _costs(result) for result in results.values()) or not results:
            raise ValueError("no lines")
    except (OSError, KeyError, ValueError, TypeError, StopIteration) as error:
        raise InputError(f"{path}: not as regpipe compare writes it ({error!r}); run that again") from error
    return results


def write_page(out: str | Path) -> str:
    """Write ``comparison.md`` and its figures from ``comparison.csv`` in ``out``; returns the table as Markdown.

    Raises:
        InputError: as ``read_csv``.
    """
    out = Path(out)
    page = comparison_table(read_csv(out))
    shown = []
    for stem, figure in drawings(out).items():
        figures.save(figure, out / f"comparison_{stem}")
        shown.append(f"![{CAPTIONS[stem]}](comparison_{stem}.svg)")
    replace_file(out / "comparison.md", ("\n\n".join([page, *shown]) + "\n").encode())
    return page


def comparison_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy and cost, a line per backbone, in Markdown; intervals are 95 % over cases."""
    lines = table({name: result["metrics"] for name, result in results.items()}).splitlines()
    costs = ["| " + " | ".join(COSTS) + " |", "|---" * len(COSTS) + "|"]
    costs += ["| " + " | ".join(_costs(result)) + " |" for result in results.values()]
    return "\n".join(line + cost[1:] for line, cost in zip(lines, costs, strict=True))


def _costs(result: Mapping[str, Any]) -> list[str]:
    return [
        interval(result["seconds_per_pair"], 3),
        f"{result['parameters'] / 1e6:.1f}",
        f"{result['flops'] / 1e9:.1f}",
        f"{result['peak_memory_bytes'] / 2**30:.2f}",
        f"{(result['training_seconds'] or math.nan) / 60:.1f}",
    ]


def drawings(out: Path) -> dict[str, Figure]:
    """``accuracy``: the metrics with intervals; ``cost``: the key metric against what it costs."""
    results = read_csv(out)
    panels: dict[str, dict[str, figures.Interval]] = {}
    before: dict[str, float] = {}
    for name, result in results.items():
        metrics = result["metrics"]
        for metric in [metric for metric in shown_in("figure") if metric in metrics]:
            panels.setdefault(heading(metric), {})[name] = tuple(metrics[metric])
            if f"{metric}_before" in metrics:
                before[heading(metric)] = metrics[f"{metric}_before"][0]
    return {"accuracy": figures.intervals(panels, before=before), "cost": _cost_figure(results)}


def _cost_figure(results: Results) -> Figure:
    key = key_metric(next(iter(results.values()))["metrics"])
    points = []
    for name, result in results.items():
        if key in result["metrics"]:
            costs = {
                "parameters, millions": result["parameters"] / 1e6,
                "GFLOP a pair": result["flops"] / 1e9,
                "seconds a pair": result["seconds_per_pair"][0],
            }
            points.append(figures.Point(name, costs, tuple(result["metrics"][key])))
    return figures.cost(points, ylabel=heading(key))

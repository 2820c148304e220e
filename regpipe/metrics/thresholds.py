"""Which registered cases a person should look at: a threshold per metric, a verdict per case, the worst first.

The defaults stand in ``metrics.metric.METRICS``, each with its reason. They sort cases for people; they do not replace
looking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from regpipe.metrics.metric import METRICS, Threshold, shown_in
from regpipe.utils.errors import InputError

Status = Literal["pass", "warn", "fail"]


class Verdict(NamedTuple):
    """What became of a case."""

    status: Status
    badness: tuple[float, ...]  # of each metric, 0 at warn and 1 at fail, the worst first: what cases are sorted by
    steps: dict[str, Status]  # of each metric that has a threshold, and a value or should have one


def thresholds(file: Path | None = None, given: Iterable[str] = ()) -> dict[str, Threshold]:
    """The defaults, changed by a YAML file and then by ``NAME=WARN,FAIL`` or ``NAME=off``.

    The file holds a line per metric: ``tre: [3, 6]``, ``ncc_gain: off``, or ``sdlogj: [0.6, null]`` for one without
    a step. Its reason becomes who set it.

    Raises:
        InputError: an unreadable file, an unknown metric, a value of another form, steps in the wrong order.
    """
    chosen = {name: metric.threshold for name, metric in METRICS.items() if metric.threshold}
    for name, value in _of_file(file).items():
        _change(chosen, name, value, f"{file}: ", f"set in {file.name}" if file else "")
    for item in given:
        name, separator, value = item.partition("=")
        if not separator:
            raise InputError(f"--threshold {item}: wants NAME=WARN,FAIL or NAME=off, e.g. tre=3,6")
        parts: Any = [part.strip() or None for part in value.split(",")]
        _change(chosen, name.strip(), False if value == "off" else parts, "--threshold ", "set by --threshold")
    return chosen


def _of_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise InputError(
            f"{file}: cannot be read ({' '.join(str(cause).split())[:120]}); see docs/report.md"
        ) from cause
    if content is None:  # comments alone
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{file}: wants a line per metric, e.g. tre: [3, 6]")
    return {str(name): value for name, value in content.items()}


def _change(chosen: dict[str, Threshold], name: str, value: Any, where: str, why: str) -> None:
    if name not in shown_in("page"):
        raise InputError(f"{where}{name}: no such metric; choose among {', '.join(shown_in('page'))}")
    if value is False or value == "off":  # YAML reads off as false
        chosen.pop(name, None)
        return
    try:
        warn, fail = (math.nan if step is None else float(step) for step in value)
        if not isinstance(value, list) or math.isinf(warn + fail) or math.isnan(warn) and math.isnan(fail):
            raise ValueError(value)
    except (TypeError, ValueError) as cause:
        raise InputError(f"{where}{name}: wants two numbers, warn and fail, or off; e.g. tre: [3, 6]") from cause
    if (warn < fail) if METRICS[name].higher else (warn > fail):
        better = "higher" if METRICS[name].higher else "lower"
        raise InputError(f"{where}{name}: {better} is better, so a case warns before it fails; exchange the two")
    chosen[name] = Threshold(warn, fail, why)


def said(name: str, limit: Threshold) -> str:
    """The steps of a metric in short: ``< 0.8, < 0.5``."""
    sign = "<" if METRICS[name].higher else ">"
    return ", ".join(f"{sign} {step:g}" for step in limit[:2] if not math.isnan(step))


def with_gains(row: Mapping[str, float]) -> dict[str, float]:
    """A row of metrics with what they gained."""
    gained = (name.removesuffix("_gain") for name in METRICS if name.endswith("_gain"))
    return {**row, **{f"{name}_gain": row[name] - row[f"{name}_before"] for name in gained if f"{name}_before" in row}}


def judge(row: Mapping[str, float], limits: Mapping[str, Threshold]) -> Verdict:
    """The verdict on a row of metrics; what a case cannot have is not judged, what it should have and has not warns."""
    steps: dict[str, Status] = {}
    badness = []
    for name, limit in limits.items():
        value = row.get(name, math.nan)
        if not math.isnan(value):
            steps[name] = _step(value, limit, METRICS[name].higher)
            badness.append(_badness(value, limit, METRICS[name].higher))
        elif _should_have(row, name):
            steps[name] = "warn"
            badness.append(0.5)  # between warn and fail
    order: tuple[Status, ...] = ("fail", "warn", "pass")
    return Verdict(next((s for s in order if s in steps.values()), "pass"), tuple(sorted(badness, reverse=True)), steps)


def _step(value: float, limit: Threshold, higher: bool) -> Status:
    sign = -1 if higher else 1
    if sign * (value - limit.fail) > 0:
        return "fail"
    return "warn" if sign * (value - limit.warn) > 0 else "pass"


def _should_have(row: Mapping[str, float], name: str) -> bool:
    before = row.get(f"{name.removesuffix('_gain')}_before", math.nan)
    return not math.isnan(before) or (METRICS[name].sound and name in row)


def _badness(value: float, limit: Threshold, higher: bool) -> float:
    """0 at warn, 1 at fail, and on at that rate; with one step only, in units of it, or of 1 where it is 0."""
    if abs(limit.fail - limit.warn) > 0:
        return (value - limit.warn) / (limit.fail - limit.warn)
    begin, step = (0.0, limit.warn) if math.isnan(limit.fail) else (1.0, limit.fail)
    return begin + (step - value if higher else value - step) / (abs(step) or 1)

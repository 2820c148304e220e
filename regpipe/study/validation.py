"""Registered cases held to a truth that they were not led by: landmarks, label maps, known displacements.

Everything is read from the files that were written, in native space and mm: what another tool would see of them. The
truth is a data set (``regpipe.list_pairs``), whose cases have the names of those that were registered.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.data.pairs import Case, list_pairs
from regpipe.data.placement import paired_landmarks
from regpipe.io import itk_bridge
from regpipe.io.source import Source
from regpipe.metrics.measures import bootstrap_interval, dice, hd95, known, shared_labels
from regpipe.transforms.apply import map_points
from regpipe.transforms.displacement import read_displacement
from regpipe.transforms.read import CASE, Space, find, read_transform
from regpipe.transforms.resample import resample
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.files import csv_bytes, replace_file

TABLE, PAGE = "validation.csv", "validation.html"
BLOCKS = 8  # along an axis: errors of neighbours are one, so that blocks of voxels are drawn and not voxels
HEAD = ("case", "measure", "unit", "n", "before", "after", "low", "high", "worst")
UNITS = {"tre": "mm", "dice": "", "hd95": "mm", "end_point": "mm"}
PICTURE = "checkerboard.png"


class Row(NamedTuple):
    """A measure of a case, or of all cases: means over ``n`` landmarks, structures, blocks of voxels, or cases."""

    case: str
    measure: str
    unit: str
    n: int
    before: float  # of the images as they lie in space
    after: float
    low: float  # 95 % bootstrap interval of ``after``
    high: float
    worst: float  # of them


def validate(folder: Path, truth: Path, out: Path | None = None) -> tuple[list[Row], dict[str, str]]:
    """Write ``validation.csv`` and ``validation.html``; returns the rows, ``all`` last, and case -> what is wrong.

    Args:
        folder: what ``regpipe register -o`` wrote.
        truth: a folder of pairs or a datalist.
        out: a folder for both; None: ``folder``.

    Raises:
        InputError: no finished case in the folder, none of a name of the truth's, or none with any truth.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give what regpipe register -o wrote")
    finished = sorted(path.parent for path in folder.glob(f"*/{CASE}"))
    cases = {case["case"]: case for case in list_pairs(truth, problems={})}
    named = [path for path in finished if path.name in cases]
    if not named:
        told = ", ".join(path.name for path in finished[:3]) or "no case"
        raise InputError(f"{folder}: holds {told}; {truth} has no pair of such a name: give the data set of these")
    rows, problems = list[Row](), dict[str, str]()
    for path in Progress(named, what="validating", unit="cases"):
        try:
            rows += _of_case(path, cases[path.name])
        except InputError as problem:
            problems[path.name] = str(problem)
    if not rows:
        why = next(iter(problems.values()), "labels, landmarks and displacements/ of both images are looked for")
        raise InputError(f"{truth}: has no truth to hold {folder} to: {why}")
    rows += _of_all(rows)
    target = out or folder
    target.mkdir(parents=True, exist_ok=True)
    table = [[*row[:4], *(f"{value:.6g}" for value in row[4:])] for row in rows]
    replace_file(target / TABLE, csv_bytes([list(HEAD), *table]))
    replace_file(target / PAGE, _page(folder, rows, problems).encode())
    return rows, problems


def _of_case(folder: Path, case: Case) -> list[Row]:
    files, move = Source(), find(folder)
    transform = read_transform(move.images)
    assert move.target is not None  # of a case
    found = {
        **_landmarks(case, files, transform),
        **_labels(case, files, transform, move.target),
        **_displacement(case, files, transform),
    }
    return [_row(folder.name, name, *values) for name, values in found.items()]


def _row(case: str, measure: str, before: np.ndarray, after: np.ndarray) -> Row:
    mean, low, high = bootstrap_interval(after)
    kept = known(after)
    worst = float((kept.min if measure == "dice" else kept.max)(initial=mean))
    told = known(before)
    return Row(case, measure, UNITS[measure], len(kept), float(told.mean()), mean, low, high, worst)


Both = dict[str, tuple[np.ndarray, np.ndarray]]  # measure -> its values before and after


def _landmarks(case: Case, files: Source, transform: Any) -> Both:
    paired = paired_landmarks(case, files)
    if paired is None:
        return {}
    both = np.isfinite(paired.fixed).all(1) & np.isfinite(paired.moving).all(1)
    fixed, moving = paired.fixed[both], paired.moving[both]
    try:
        moved = map_points(fixed, transform)
    except InputError as problem:
        raise InputError(f"{case['fixed_landmarks']}: {problem}") from None
    return (
        {"tre": (np.linalg.norm(fixed - moving, axis=1), np.linalg.norm(moved - moving, axis=1))} if both.any() else {}
    )


def _labels(case: Case, files: Source, transform: Any, grid: Space) -> Both:
    if not {"fixed_label", "moving_label"} <= case.keys():
        return {}
    fixed, moving = (files.label(case[f"{s}_label"], image=case[f"{s}_image"])[0] for s in ("fixed", "moving"))
    ids = shared_labels(fixed.array, moving.array)
    if not ids or fixed.array.shape != tuple(grid.shape):  # one slice in space: its files lie in 3-D
        return {}
    still = itk_bridge.itk_affine(np.eye(len(grid.shape) + 1))
    warped = [resample(moving, way, Space(fixed.array.shape, fixed.affine), "nearest") for way in (still, transform)]
    scores = [np.array([*dice(fixed.array, image, ids).values()]) for image in warped]
    apart = [np.array([*hd95(fixed.array, image, ids, fixed.spacing.tolist()).values()]) for image in warped]
    return {"dice": (scores[0], scores[1]), "hd95": (apart[0], apart[1])}


def _displacement(case: Case, files: Source, transform: Any) -> Both:
    if "displacement" not in case:
        return {}
    true, affine = files.read(case["displacement"], read_displacement)
    if len(true) != transform.GetInputSpaceDimension():
        raise InputError(f"{case['displacement']}: is {len(true)}-D, the transform is not; give one of its images")
    found = itk_bridge.sampled(transform, true.shape[1:], affine)
    return {"end_point": (_blocks(np.linalg.norm(true, axis=0)), _blocks(np.linalg.norm(found - true, axis=0)))}


def _blocks(values: np.ndarray) -> np.ndarray:
    """Means of (*S) over ``BLOCKS`` parts along each axis."""
    for axis, n in enumerate(values.shape):
        starts = np.unique(np.linspace(0, n, BLOCKS, endpoint=False).astype(int))
        counts = np.diff([*starts, n]).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        values = np.add.reduceat(values, starts, axis=axis) / counts
    return values.ravel()


def _of_all(rows: Sequence[Row]) -> list[Row]:
    """The means over the cases that have a measure."""
    found = []
    for measure in dict.fromkeys(row.measure for row in rows):
        of_cases = [row for row in rows if row.measure == measure]
        before, after = (np.array([getattr(row, name) for row in of_cases]) for name in ("before", "after"))
        found.append(_row("all", measure, before, after))
    return found


def _page(folder: Path, rows: Iterable[Row], problems: Mapping[str, str]) -> str:
    """A page without scripts; its pictures are inside."""

    def line(cells: Iterable[Any], tag: str = "td") -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    rows = list(rows)
    table = [line([*row[:4], *(f"{value:.4g}" for value in row[4:])]) for row in rows]
    wrong = "".join(f"<li>{html.escape(f'{name}: {told}')}</li>" for name, told in problems.items())
    shown = []
    for name in dict.fromkeys(row.case for row in rows if (folder / row.case / PICTURE).is_file()):
        data = base64.b64encode((folder / name / PICTURE).read_bytes()).decode()
        shown.append(
            f'<figure><img alt="checkerboard of {html.escape(name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
        )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(folder.resolve().name)}: validation</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem; color-scheme: light dark }}
table {{ border-collapse: collapse }}
td, th {{ padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #8886 }}
td:first-child, td:nth-child(2) {{ text-align: left }} figure {{ display: inline-block; margin: 1rem 1rem 0 0 }}
img {{ width: 24rem; max-width: 100%; image-rendering: pixelated }}</style>
<h1>Validation</h1>
<p>Held to the truth in native space. Before: the images as they lie in space. Low and high: the 95 % bootstrap interval
of what is after, over n landmarks, structures or blocks of voxels, and of all over n cases.</p>
{f"<ul>{wrong}</ul>" if wrong else ""}
<table>{line(HEAD, "th")}{"".join(table)}</table>
<h2>Checkerboards</h2>
<p>Fixed and warped image in turn: edges must run on from square to square.</p>
{"".join(shown)}
</html>
"""

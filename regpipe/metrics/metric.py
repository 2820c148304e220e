"""What each metric is: how it is computed, named, judged and shown. Tables, pages, charts and files are made from this.

``TG-132`` is Brock et al., 'Use of image registration and fusion algorithms and techniques in radiotherapy', Med.
Phys. 44 (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Literal, NamedTuple

from regpipe import metrics as room  # its measures bring torch, which a page of old results does not need

if TYPE_CHECKING:
    from regpipe.metrics.measured import Measured

Kind = Literal["accuracy", "similarity", "regularity"]
# table: evaluation and comparison; page: the QC page, where it may have a threshold; figure: a panel of the comparison;
# chart: TensorBoard's Custom Scalars; best: its HParams.
Place = Literal["table", "page", "figure", "chart", "best"]
EVERYWHERE: tuple[Place, ...] = ("table", "page", "figure", "chart", "best")


class Threshold(NamedTuple):
    """From ``warn`` on a case is looked at, from ``fail`` on it is not used; beyond, not at. NaN: no such step."""

    warn: float
    fail: float
    why: str


class Metric(NamedTuple):
    """A number that says how good a registration is."""

    title: str
    about: str
    measure: Callable[[Measured], float] | None = None  # NaN: a case has none; None: it comes from elsewhere
    unit: str = ""
    higher: bool = False  # is better
    before: bool = False  # is measured before registration, too, as ``NAME_before``
    kind: Kind = "accuracy"
    digits: int = 3  # after the point, in tables
    shown: tuple[Place, ...] = EVERYWHERE
    threshold: Threshold | None = None
    sound: bool = False  # judges a registration without any truth


METRICS: dict[str, Metric] = {
    "dice": Metric(
        "Dice",
        "overlap of the labels after registration, mean over structures, nearest neighbour",
        lambda case: room.measures.mean_of(room.measures.dice(*case.labels, case.ids).values()),
        before=True,
        threshold=Threshold(
            0.8, 0.5, "TG-132 expects 0.80 to 0.90 for organs; below one half more differs than agrees"
        ),
        higher=True,
    ),
    "dice_gain": Metric(
        "Dice gain",
        "Dice after minus Dice before",
        shown=("page",),
        threshold=Threshold(0.0, -0.05, "registration shall not make overlap worse than it was"),
        higher=True,
    ),
    "hd95": Metric(
        "HD95",
        "95 % Hausdorff distance between label surfaces",
        lambda case: room.measures.mean_of(room.measures.hd95(*case.labels, case.ids, case.spacing).values()),
        before=True,
        digits=2,
        threshold=Threshold(5, 10, "surfaces within 2 to 3 mm on average (TG-132) leave few places 5 mm apart"),
        unit="mm",
    ),
    "tre": Metric(
        "TRE",
        "mean distance of corresponding landmarks after registration",
        lambda case: room.measures.mean_of(case.errors),
        before=True,
        digits=2,
        threshold=Threshold(2, 5, "TG-132: 2 mm on average, 5 mm at most"),
        unit="mm",
    ),
    "ncc": Metric(
        "NCC",
        "normalised cross-correlation of fixed and warped image, of one modality only",
        lambda case: room.measures.ncc(case.fixed, case.warped),
        before=True,
        kind="similarity",
        higher=True,
    ),
    "ncc_gain": Metric(
        "NCC gain",
        "NCC after minus NCC before",
        shown=("page",),
        threshold=Threshold(
            0.0, math.nan, "images of one modality shall be more alike than before; turn it off for two"
        ),
        higher=True,
    ),
    "folds_percent": Metric(
        "folds",
        "voxels whose Jacobian determinant is 0 or less",
        lambda case: room.measures.folds_percent(case.displacement, case.determinant),
        kind="regularity",
        digits=4,
        shown=("table", "page", "chart", "best"),
        threshold=Threshold(0, 0.1, "TG-132: no Jacobian determinant below 0; a few voxels at a rim can be borne"),
        sound=True,
        unit="%",
    ),
    "ndv_percent": Metric(
        "NDV",
        "volume that is turned inside out, exact between voxels",
        lambda case: room.measures.ndv_percent(case.displacement),
        kind="regularity",
        digits=4,
        shown=("table", "page", "best"),
        threshold=Threshold(0.01, 0.1, "as for folds; this one also sees those between voxels"),
        sound=True,
        unit="%",
    ),
    "sdlogj": Metric(
        "SDlogJ",
        "spread of the logarithm of the local volume change",
        lambda case: room.measures.sdlogj(case.displacement, case.determinant),
        kind="regularity",
        threshold=Threshold(0.5, 1.0, "one standard deviation is a factor of 1.6 in volume, then 2.7: seldom anatomy"),
        sound=True,
    ),
    "sdlogj_l2r": Metric(
        "SDlogJ, Learn2Reg's",
        "what the challenge calls SDlogJ",
        lambda case: room.measures.sdlogj_l2r(case.displacement, case.determinant),
        kind="regularity",
        shown=(),
    ),
    "inverse_consistency": Metric(
        "inverse error",
        "mean distance after going there and back",
        lambda case: room.measures.inverse_consistency(
            case.displacement, case.inverse, case.spacing, layers=case.layers
        ),
        kind="regularity",
        shown=("table", "page", "chart"),
        threshold=Threshold(1, 3, "TG-132: within the largest voxel dimension, about 2 to 3 mm"),
        sound=True,
        unit="mm",
    ),
    "affine_overlap": Metric(
        "aligned overlap",
        "Dice of both images' masks or fields of view once aligned",
        shown=("page",),
        threshold=Threshold(0.5, 0.3, "the images show different places, or the alignment went wrong"),
        sound=True,
        higher=True,
    ),
    "uncertainty": Metric(
        "expected error", "how far off it may be, mean of what is not dark", unit="mm", shown=("page",)
    ),
    "repaired": Metric("repaired", "how far removing folds moved the field, at most", unit="voxel", shown=("page",)),
}


def shown_in(place: Place) -> list[str]:
    """The metrics of a place, in the order of ``METRICS``."""
    return [name for name, metric in METRICS.items() if place in metric.shown]


def columns(place: Place | None = None) -> dict[str, Metric]:
    """What is measured of a case, in the order of its row: name -> metric, with ``NAME_before``; all, or of a place."""
    measured = [(name, metric) for name, metric in METRICS.items() if metric.measure]
    return {
        column: metric
        for name, metric in measured
        if place is None or place in metric.shown
        for column in ([f"{name}_before"] if metric.before else []) + [name]
    }


def heading(column: str) -> str:
    """A column's title with its unit: ``HD95 before mm``."""
    metric = columns()[column]
    return " ".join(word for word in (metric.title, "before" * column.endswith("_before"), metric.unit) if word)


def key_metric(known: Container[str]) -> str:
    """What models are ranked by, of the metrics that are known: Dice, without labels the TRE, else NCC."""
    return next(name for name in ("dice", "tre", "ncc") if name in known)

"""The landmarks of a pair: which of both images are the same place."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from regpipe.data.pairs import SIDES, Case
from regpipe.io.landmarks import pairing
from regpipe.io.source import Source


class Paired(NamedTuple):
    """The landmark files of a case."""

    fixed: np.ndarray  # (K, D) LPS mm
    moving: np.ndarray
    counts: tuple[int, int]  # in the files
    order: tuple[np.ndarray, np.ndarray] | None  # the rows of both that ``fixed`` and ``moving`` are; None: all


def paired_landmarks(case: Case, files: Source) -> Paired | None:
    """By their names, see ``io.landmarks.pairing``; None where one side has no file.

    Without names their numbers may differ.
    """
    if not all(f"{side}_landmarks" in case for side in SIDES):
        return None
    fixed, moving = (files.landmarks(case[f"{side}_landmarks"], case[f"{side}_image"]) for side in SIDES)
    order = pairing(fixed, moving, case["fixed_landmarks"], case["moving_landmarks"])
    rows = (slice(None), slice(None)) if order is None else order
    return Paired(fixed.points[rows[0]], moving.points[rows[1]], (len(fixed.points), len(moving.points)), order)

"""Finished cases on disk, as registering writes them, without registering: for the report's tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from regpipe.report.pictures import save_png
from regpipe.report.views import IMAGES, Landmarks, Shown, write_view


def write_case(folder: Path, name: str, metrics: Mapping[str, float | None], *, dim: int = 2) -> Path:
    """A disc that is bright in the fixed and dark in the warped image, with labels, landmarks and a moving grid."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"case": name, **metrics, "made_from": {}}))
    about = {"versions": {"regpipe": "0"}, "settings": {"refine": 5}, "alignment": {"stage": "affine"}}
    (folder / "transform.json").write_text(json.dumps(about))
    save_png(folder / "sheet.png", np.zeros((4, 4, 3), np.uint8))
    shape = (24, 20, 16)[:dim]
    at = np.indices(shape) - np.reshape(np.array(shape) // 2, (dim, *[1] * dim))
    disc = (np.linalg.norm(at, axis=0) < 6).astype(np.float32)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0][:dim] + [1.0])
    images = dict(zip(IMAGES, (0.2 + 0.7 * disc, np.full(shape, 0.3), 0.9 - 0.6 * disc), strict=True))
    d = np.stack([ndimage.gaussian_filter(n, 3) for n in np.random.default_rng(0).standard_normal((dim, *shape))])
    labels = dict.fromkeys(IMAGES, disc.astype(int))
    shown = Shown(affine, images, labels, 20 * d.astype(np.float32), 1 + at[0] / 8, np.eye(dim + 1))
    place = affine[:dim, :dim] @ (np.array([shape]) // 2)[0]
    points = Landmarks(*(np.array([place + shift]) for shift in (0, 4, 1)), errors=np.array([[6.9, 1.7]]))  # type: ignore[misc]
    write_view(folder / "view", shown, points)
    return folder

"""Small folders of images, and who is in their cases."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image as Picture

RNG = np.random.default_rng(1)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def volume(shape: tuple[int, ...] = (6, 7, 8)) -> np.ndarray:
    return RNG.random(shape).astype(np.float32)


def two_folders(root: Path, n: int = 4) -> Path:
    for i in range(n):
        for side in ("fixed", "moving"):
            save(root / f"{side}_images" / f"c{i}.nii.gz", volume())
            save(root / f"{side}_labels" / f"c{i}.nii.gz", np.ones((6, 7, 8), np.uint8))
            (root / f"{side}_landmarks").mkdir(exist_ok=True)
            (root / f"{side}_landmarks" / f"c{i}.csv").write_text("x,y,z\n-1,-2,3\n-2,-2,1\n")
    return root


def frames(root: Path, n: int = 12) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Picture.fromarray(RNG.integers(0, 255, (8, 9), dtype=np.uint8)).save(root / f"f{i}.png")
    return root


def subjects(cases: list[dict[str, str]]) -> set[str]:
    return {c[f"{side}_image"] for c in cases for side in ("fixed", "moving")}


def finished(out: Path) -> set[str]:
    """The cases that have their results."""
    return {path.parent.name for path in out.glob("*/metrics.json")}

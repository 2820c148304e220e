"""Pairs of images that are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from helpers.folders import save

SHAPE = (24, 30, 20)


def smooth(shape: tuple[int, ...], seed: int, sigma: float = 2) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), sigma).astype(np.float32)


def pairs(folder: Path, n: int) -> list[dict[str, str]]:
    found = []
    for i in range(n):
        files = {f"{side}_image": str(folder / f"{side}{i}.nii.gz") for side in ("fixed", "moving")}
        save(Path(files["fixed_image"]), smooth(SHAPE, 0) + 0.1 * smooth(SHAPE, i + 1), np.diag([1, 1, 2 + i, 1]))
        save(Path(files["moving_image"]), smooth(SHAPE, 99) + 0.1 * smooth(SHAPE, i + 1))
        found.append({"case": f"c{i}", **files})
    return found

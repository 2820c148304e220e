"""Pairs of two channels, each of which shows motion along one axis alone, and their true displacement."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # a voxel's index is its place in LPS mm


def stripes(at: np.ndarray, seed: int) -> np.ndarray:
    """A random profile along one axis, at places (S, S) along it: nothing of it tells a motion along the other."""
    size = len(at)
    profile = ndimage.gaussian_filter1d(np.random.default_rng(seed).standard_normal(4 * size), 2.0)
    noise = np.random.default_rng(seed + round(float(at.sum()))).standard_normal(at.shape)
    return (np.interp(at, np.arange(4 * size) - size, profile) + 0.02 * noise).astype(np.float32)


def as_4d(path: Path, channels: list[np.ndarray]) -> Path:
    """Images of one grid as one file."""
    nib.save(nib.Nifti1Image(np.stack(channels, -1)[:, :, None], FROM_LPS), path)
    return path


def write_stripes(folder: Path, *, count: int, size: int = 48, most: float = 3.0) -> Path:
    """A folder of pairs of 4D files: channel 0 varies along axis 0, channel 1 along axis 1; and what moved them."""
    rng, at = np.random.default_rng(0), np.indices((size, size)).astype(float)
    for name in ("fixed_images", "moving_images", "displacements"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        centre, width = rng.uniform(0.35, 0.65, (2, 1, 1)) * size, rng.uniform(8, 12)
        bump = np.exp(-((at - centre) ** 2).sum(0) / (2 * width**2))
        u = most * rng.choice([-1, 1], (2, 1, 1)) * bump  # fixed(p) = moving(p + u(p))
        for side, places in (("fixed", at + u), ("moving", at)):
            channels = [stripes(place, 1000 * axis + i) for axis, place in enumerate(places)]
            as_4d(folder / f"{side}_images" / f"case_{i:02}.nii.gz", channels)
        field = nib.Nifti1Image(np.moveaxis(u, 0, -1)[:, :, None, None].astype(np.float32), FROM_LPS)
        field.header.set_intent("vector")
        nib.save(field, folder / "displacements" / f"case_{i:02}.nii.gz")
    return folder

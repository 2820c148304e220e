"""Means over a group, one subject in memory at a time: of matrices, of velocities, of images, of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.linalg import expm, logm

from regpipe.utils.errors import InputError

TRIES = 50  # of taking the mean logarithm out
STILL = 1e-10
EQUAL = 1e-3  # of a vote: thirds that do not sum to one


def without_mean(matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The matrices A_i (D+1, D+1) as ``A_i exp(-m)``, so that their logarithms sum to zero.

    All are moved by one map of the template's space: what they say of each other stays as it is. Arsigny et al.,
    'A log-Euclidean framework' and Pennec & Arsigny 2013: the mean of a group, which no subject is closer to by order.

    Raises:
        InputError: a matrix turns by half a turn or mirrors: it has no logarithm.
    """
    left = [np.array(matrix, np.float64) for matrix in matrices]
    for _ in range(TRIES):
        mean = np.mean([_log(matrix) for matrix in left], axis=0)
        if np.abs(mean).max() < STILL:
            break
        left = [matrix @ expm(-mean) for matrix in left]
    return left


def along_time(matrices: Sequence[np.ndarray], shares: np.ndarray) -> list[np.ndarray]:
    """Of each frame the mean of all frames' logarithms, by its row of ``shares`` (N, N)."""
    return [expm(log) for log in np.tensordot(shares, np.array([_log(matrix) for matrix in matrices]), axes=1)]


def log_sum(matrices: Sequence[np.ndarray]) -> float:
    """The largest number in the mean of the logarithms: 0 where no subject draws the template to itself."""
    return float(np.abs(np.mean([_log(matrix) for matrix in matrices], axis=0)).max())


def _log(matrix: np.ndarray) -> np.ndarray:
    found = logm(matrix)
    if np.iscomplexobj(found) and np.abs(found.imag).max() > 1e-6:
        raise InputError(
            "an affine map turns by half a turn, or mirrors: bring the subjects into one orientation first"
        )
    return np.asarray(found.real, np.float64)


class Mean(NamedTuple):
    """The mean of images that each cover a part of the grid."""

    image: np.ndarray  # (*S) float32; 0 where nobody is
    covered: np.ndarray  # (*S) float32, share of the subjects


def mean_image(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Mean:
    """Of pairs image (*S), 0 outside its field of view, and coverage (*S) in [0, 1]; in the order given."""
    total, weight, count = np.zeros(()), np.zeros(()), 0
    for image, covered in parts:
        total, weight, count = total + image.astype(np.float64), weight + covered.astype(np.float64), count + 1
    mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0.5 / count)
    return Mean(mean.astype(np.float32), (weight / count).astype(np.float32))


class Votes:
    """Votes of label maps on one grid: memory goes with the number of labels, not of subjects."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.counts: dict[int, np.ndarray] = {}
        self.shape, self.voters = tuple(shape), 0.0

    def add(self, labels: np.ndarray, weight: float = 1.0) -> None:
        """Count a (*S) map; ``weight``: its share of its subject's vote."""
        self.voters += weight
        for label in np.unique(labels):
            counted = self.counts.setdefault(int(label), np.zeros(self.shape, np.float32))
            counted[labels == label] += weight

    def won(self) -> np.ndarray:
        """(*S) int64, what most voted for; among equals the lowest id."""
        best, winner = np.zeros(self.shape, np.float32), np.zeros(self.shape, np.int64)
        for label, counted in sorted(self.counts.items()):
            winner[counted > best + EQUAL] = label
            np.maximum(best, counted, out=best)
        return winner

    def probability(self, label: int) -> np.ndarray:
        """(*S) float32: the share that voted for it."""
        return (self.counts[label] / self.voters).astype(np.float32)


def sharpness(image: np.ndarray, spacing: Sequence[float]) -> float:
    """Mean length of the gradient per mm where the image is not dark: of a mean image, how alike its parts lie."""
    slopes = [ndimage.sobel(image, axis) / (8 * 4 ** (image.ndim - 2) * mm) for axis, mm in enumerate(spacing)]
    bright = image > 0.1 * image.max()
    return float(np.linalg.norm(slopes, axis=0)[bright].mean()) if bright.any() else 0.0

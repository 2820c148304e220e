"""Phantoms of no organ and no scanner: random shapes, in grey values drawn for each image by itself.

A network that learns on them cannot lean on a contrast, only on where borders are: SynthMorph (Hoffmann et al., IEEE
TMI 2022). There the shapes are the largest of smooth noise volumes; here of smooth closed-form functions, so that a
deformed label map is exact and not resampled. The parts fit ``phantoms.scenes.KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from regpipe.phantoms.motion import Array, Generator, Waves, unit_grid, waves

LABELS = 8  # shapes of a scene, the background among them
FREQUENCY = 9.0  # radians per unit: higher makes smaller shapes
LANDMARKS = 24


class Scene(NamedTuple):
    """Random functions; the largest of them at a point is its label."""

    patterns: tuple[Waves, ...]
    landmarks: Array  # (D, K) anywhere: the answer is exact everywhere


def draw(rng: Generator, dim: int) -> Scene:
    """A scene in ``dim`` dimensions."""
    patterns = tuple(waves(rng, dim, frequency=FREQUENCY, rms=1.0, count=8) for _ in range(LABELS))
    return Scene(patterns, rng.uniform(-0.95, 0.95, (dim, LANDMARKS)))


def label(scene: Scene, tissue: Array) -> NDArray[np.uint8]:
    """Label map (*S) at tissue points (D, *S)."""
    found = np.zeros(tissue.shape[1:], np.uint8)
    highest = np.full(tissue.shape[1:], -np.inf)
    for number, pattern in enumerate(scene.patterns):
        height = pattern(tissue)
        found[height > highest] = number
        np.maximum(highest, height, out=highest)
    return found


def points(scene: Scene) -> Array:
    return scene.landmarks


def scan(rng: Generator, scene: Scene, tissue: Array, place: Callable[[Array], Array]) -> Array:
    """An image (*S) in [0, 1]: a grey value per label, texture, blur, bias field, noise; all new for each image."""
    # Evenly spread before the jitter: with free draws many a border would vanish.
    greys = (rng.permutation(LABELS) + rng.uniform(-0.3, 0.3, LABELS)) / LABELS + 0.1
    image = greys[label(scene, tissue)]
    image = image * (1 + waves(rng, len(tissue), frequency=12, rms=rng.uniform(0, 0.06), count=6)(tissue))
    image = gaussian_filter(image, rng.uniform(0.3, 1.0), mode="nearest")
    bias = waves(rng, len(tissue), frequency=3, rms=rng.uniform(0, 0.25))
    image = image * np.exp(bias(unit_grid(image.shape)))
    image = image / image.max() + rng.normal(0, rng.uniform(0.005, 0.05), image.shape)
    return np.clip(image, 0, 1) ** np.exp(rng.normal(0, 0.2))

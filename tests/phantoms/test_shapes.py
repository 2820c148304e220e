"""Random shapes: two contrasts of one scene, and nothing of a contrast to lean on."""

from __future__ import annotations

import numpy as np
import pytest

from regpipe.phantoms import shapes
from regpipe.phantoms.motion import unit_grid
from regpipe.phantoms.scenes import Phantom, make_pair
from regpipe.phantoms.shapes import LABELS

BOTH = pytest.mark.parametrize("shape", [(64, 64), (24, 24, 24)])


def greys(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    return np.array([image[label == n].mean() for n in range(LABELS)])


def pairs(shape: tuple[int, ...], count: int = 12) -> list[Phantom]:
    return [make_pair("shapes", shape, seed=seed, magnitude=0) for seed in range(count)]


def test_the_label_is_the_highest_pattern() -> None:
    scene = shapes.draw(np.random.default_rng(0), 2)
    q = unit_grid((20, 24))
    heights = np.stack([pattern(q) for pattern in scene.patterns])
    np.testing.assert_array_equal(shapes.label(scene, q), heights.argmax(0))


@BOTH
def test_every_label_is_there_and_none_fills_the_image(shape: tuple[int, ...]) -> None:
    for pair in pairs(shape, 6):
        share = np.bincount(pair.fixed_label.ravel(), minlength=LABELS) / pair.fixed_label.size
        assert share.min() > 0.01 and share.max() < 0.35


@BOTH
def test_the_contrast_of_one_image_says_nothing_about_the_other(shape: tuple[int, ...]) -> None:
    seen = [[greys(i, p.fixed_label) for i in (p.fixed_image, p.moving_image)] for p in pairs(shape)]
    correlations = np.array([np.corrcoef(fixed, moving)[0, 1] for fixed, moving in seen])
    assert abs(correlations.mean()) < 0.35  # of 12 draws with a spread of 0.38 each
    assert correlations.min() < 0 < correlations.max()


@BOTH
def test_yet_the_labels_explain_both_images(shape: tuple[int, ...]) -> None:
    for pair in pairs(shape, 6):
        np.testing.assert_array_equal(pair.fixed_label, pair.moving_label)  # no deformation here
        for image in (pair.fixed_image, pair.moving_image):
            left = image - greys(image, pair.fixed_label)[pair.fixed_label]
            assert left.var() < 0.6 * image.var()


def test_images_differ_in_noise_blur_and_shading() -> None:
    # left over inside the shapes: the spread of it is drawn anew for each image
    spread = [
        (image - greys(image, pair.fixed_label)[pair.fixed_label]).std()
        for pair in pairs((64, 64), 6)
        for image in (pair.fixed_image, pair.moving_image)
    ]
    assert max(spread) > 1.4 * min(spread)

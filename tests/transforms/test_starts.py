"""The search elsewhere: turns and shifts that are known, and pairs that look alike nowhere. Distances in voxels."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from regpipe.io.images import Image
from regpipe.transforms import starts
from regpipe.transforms.affine import align
from regpipe.transforms.likeness import make_sides


def blobs(dim: int, seed: int, side: int = 96) -> np.ndarray:
    """Unlike blobs in the middle third or half of a dark field: no turn or shift of it looks like itself."""
    rng = np.random.default_rng(seed)
    image = np.zeros((side,) * dim)
    for _ in range(9):
        centre = rng.uniform(0.35, 0.65, dim) * side
        squared = sum(np.square(axis - c) for axis, c in zip(np.indices(image.shape), centre, strict=True))
        image += rng.uniform(0.3, 1) * np.exp(-squared / (2 * rng.uniform(2, 6) ** 2))
    return image.astype(np.float32)


def error(found: np.ndarray, truth: np.ndarray, side: int = 96) -> float:
    """How far apart both put the points of the middle, on average."""
    points = np.random.default_rng(0).uniform(0.3 * side, 0.7 * side, (100, len(truth) - 1))
    at = [points @ m[:-1, :-1].T + m[:-1, -1] for m in (found, truth)]
    return float(np.linalg.norm(at[0] - at[1], axis=1).mean())


@pytest.mark.parametrize(("dim", "seed"), [(2, 1), (2, 2), (3, 1), (3, 4)])
def test_any_turn_is_found(dim: int, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    side = 96 if dim == 2 else 48
    turn = Rotation.random(random_state=seed) if dim == 3 else Rotation.from_euler("z", 80 * seed, degrees=True)
    middle = np.full(dim, (side - 1) / 2)
    truth = starts.onto(middle, middle, turn.as_matrix()[:dim, :dim])
    image = blobs(dim, seed, side)
    found = align(Image(image, np.eye(dim + 1)), Image(image, truth), "rigid")
    assert error(np.eye(dim + 1), truth, side) > 4
    assert error(found.matrix, truth, side) < 1
    assert "far more alike there" in caplog.text


def test_two_views_of_96_voxels_that_share_36_are_laid_upon_each_other() -> None:
    noise = np.random.default_rng(4).standard_normal((156, 96))
    scene = ndimage.gaussian_filter(noise, 7).astype(np.float32)
    own = np.eye(3)
    found = align(Image(scene[:96], own), Image(scene[60:], own), "rigid")
    assert error(found.matrix, starts.onto(np.zeros(2), np.array([-60.0, 0]))) < 1


def test_a_pair_that_lies_well_is_not_searched() -> None:
    image = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((48, 48, 48)).astype(np.float32), 4)
    moved = ndimage.shift(image, (1, -1, 0.5), order=1)
    _, seen = make_sides(Image(image, np.eye(4)), Image(moved, np.eye(4)), None, None, size=48)

    def never(_start: np.ndarray) -> np.ndarray:
        raise AssertionError("searched")

    assert starts.elsewhere(seen, seen, own := np.eye(4), never) is own


def test_between_images_that_resemble_each_other_nowhere_the_usual_end_stays_and_is_doubted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    noise = [ndimage.gaussian_filter(np.random.default_rng(s).standard_normal((96, 96)), 4) for s in (0, 1)]
    fixed, moving = (Image(n.astype(np.float32), np.eye(3)) for n in noise)
    _, seen = make_sides(fixed, moving, None, None, size=96)
    far = starts.onto(np.zeros(2), np.array([30.0, 20]))
    with caplog.at_level(logging.WARNING):
        assert starts.elsewhere(seen, seen, far, lambda start: start) is far
    assert "in doubt" in caplog.text


@pytest.mark.parametrize(("dim", "widest"), [(2, 7.5), (3, 33.0)])
def test_every_rotation_lies_near_one_of_the_sweep(dim: int, widest: float) -> None:
    swept = starts._rotations(dim)
    drawn = Rotation.random(2000, random_state=0).as_matrix()
    if dim == 2:
        angle = np.random.default_rng(0).uniform(0, 360, 2000)
        drawn = Rotation.from_rotvec(np.deg2rad(angle)[:, None] * [0, 0, 1]).as_matrix()[:, :2, :2]
    trace = np.einsum("nij,mij->nm", drawn, swept)
    cosine = trace / 2 if dim == 2 else (trace - 1) / 2
    assert np.degrees(np.arccos(np.clip(cosine.max(axis=1), -1, 1))).max() <= widest

"""Truth: what was put outside when the image was made; what linear interpolation touches, by a naive loop."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from helpers.folders import save
from regpipe.data.load import LoadPair
from regpipe.io import background, images
from regpipe.io.images import Image
from regpipe.io.source import Source
from regpipe.transforms.displacement import resample_through
from regpipe.utils.errors import InputError

SHAPE = (24, 28, 20)
RNG = np.random.default_rng(5)
NOISE = RNG.standard_normal(SHAPE)
BODY = (((np.indices(SHAPE).T - (np.array(SHAPE) - 1) / 2) / [9, 10, 12]) ** 2).sum(-1).T < 1  # reaches both ends
TISSUE = 40 + 20 * NOISE
SMOOTH = ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 2)
FILM = (((np.indices((40, 30)).T - [20, 15]) / [12, 10]) ** 2).sum(-1).T < 1


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.where(BODY, TISSUE, -1000), -1000),  # CT
        (np.where(BODY, TISSUE, -1000 + 15 * NOISE), -1000),  # with noise
        (np.where(BODY, 300 + 50 * NOISE, 8 * np.abs(NOISE)), 0),  # MR
        (300 + 50 * np.abs(NOISE), 0),  # that fills its field of view
        (np.where(BODY, NOISE, 0), 0),  # a map of statistics, of both signs
        (np.where(BODY, NOISE, np.nan), math.nan),
        (np.where(FILM, 60, 255), 255),  # a slide
        (np.where(FILM, 60, 250 + np.round(2 * RNG.random((40, 30)))), 251),  # as a JPEG
        (np.where(BODY, 1 + 0.3 * NOISE, -0.7 + 0.02 * NOISE), -0.7),  # MR, standardised
        (SMOOTH, SMOOTH.min()),  # nothing is known of its outside
    ],
)
def test_the_outside_of_an_image_is_what_it_has_around_its_content(array: np.ndarray, value: float) -> None:
    slack = 0.01 * np.nanmax(np.abs(array))
    assert background.outside(array.astype(np.float32)) == pytest.approx(value, abs=slack, nan_ok=True)
    turned = np.flip(array.astype(np.float32).T)[None]  # one slice of 3-D has no ends along its normal
    assert background.outside(turned) == background.outside(array.astype(np.float32)) or math.isnan(value)


def naive(image: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Linear interpolation at ``i + shift``, NaN where a voxel of weight above 1e-6 is NaN; shifts are within it."""
    out = np.full(image.shape, -7.0)
    for at in np.ndindex(image.shape):
        place = np.array(at) + shift
        if (place < 0).any() or (place > np.array(image.shape) - 1).any():
            continue
        base, total = np.floor(place).astype(int), 0.0
        for corner in itertools.product((0, 1), repeat=image.ndim):
            weight = np.prod(np.where(corner, place - base, 1 - (place - base)))
            total += weight * image[tuple(base + corner)] if weight > 1e-6 else 0
        out[at] = total
    return out


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (0.25, 0), (0.25, 0.5), (1e-12, 1 - 1e-12)])
def test_nan_reaches_as_far_as_linear_interpolation_does(shift: tuple[float, float]) -> None:
    image = RNG.random((12, 10)).astype(np.float32)
    image[4, 5], image[8:, :3] = np.nan, np.nan
    d = -np.array(shift)[:, None, None] * np.ones((2, 12, 10))  # LPS
    found = resample_through(Image(image, np.eye(3)), d, np.eye(3), order=1, fill=-7)
    expected = naive(image, np.array(shift))
    inside = expected != -7
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-6)


def write_pair(folder: Path) -> dict[str, str]:
    """Two images of one scene, the moving one NaN in a corner; what hides there is far from the fixed image's."""
    scene = np.abs(SMOOTH) + 1
    hidden = scene.copy()
    hidden[:9, :9, :9] = np.nan
    files = {"fixed_image": save(folder / "f.nii.gz", scene), "moving_image": save(folder / "m.nii.gz", hidden)}
    return {"case": "one", **{role: str(path) for role, path in files.items()}}


def test_what_is_no_data_is_masked_and_continued(tmp_path: Path) -> None:
    case, grid = write_pair(tmp_path), images.make_grid(SHAPE, (1, 1, 1))
    item = LoadPair(grid, affine="none")(case, Source())
    known = np.ones(SHAPE, bool)
    known[:9, :9, :9] = False
    own = images.to_grid(images.read_image(case["moving_image"]), grid)
    np.testing.assert_array_equal(own, np.eye(4))
    np.testing.assert_array_equal(item["moving_mask"][0].numpy() > 0, known)
    assert item["fixed_mask"].all()
    assert np.isfinite(item["moving_image"].numpy()).all()
    assert item["moving_image"][0, 0, 0, 0] == item["moving_image"][0, 9, 0, 0]


def test_a_sheared_image_keeps_its_gaps(tmp_path: Path) -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    image = np.where(BODY, TISSUE, np.nan)
    read = images.read_image(save(tmp_path / "s.nii.gz", image.astype(np.float32), sheared))
    volume = abs(np.linalg.det(read.affine))
    assert 0.6 * BODY.sum() < np.isfinite(read.array).sum() * volume < BODY.sum()  # a rim is lost, no more


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_values_and_nothing_at_all_are_refused(tmp_path: Path, value: float) -> None:
    array = TISSUE.copy()
    array[3, 3, 3] = value
    for held in (array, np.full(SHAPE, np.nan)):
        with pytest.raises(InputError, match="infinite values, or NaN alone"):
            images.read_image(save(tmp_path / "a.nii.gz", held))

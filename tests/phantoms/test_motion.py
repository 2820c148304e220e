"""A motion like a breath is as large as asked, exact and without folds."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from regpipe.metrics.measures import folds_percent, ndv_percent
from regpipe.phantoms.cohort import write_cohort
from regpipe.phantoms.motion import LARGEST_MOTION, random_motion, unit_grid
from regpipe.phantoms.scenes import KINDS, make_pair, paint
from regpipe.utils.errors import InputError

SHAPES = ((64, 64), (64, 64, 64))
every_shape = pytest.mark.parametrize("shape", SHAPES)


def pull(image: np.ndarray, u: np.ndarray) -> np.ndarray:
    """image(x + u(x)), by scipy; NaN beyond the rim."""
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"))
    return map_coordinates(image, grid + u, order=1, cval=np.nan)


def length(u: np.ndarray) -> np.ndarray:
    return np.linalg.norm(u, axis=0)


@pytest.mark.parametrize(("kind", "shape"), [*((kind, SHAPES[0]) for kind in KINDS), ("mr", SHAPES[1])])
def test_the_largest_displacement_is_what_was_asked_and_nothing_folds(kind: str, shape: tuple[int, ...]) -> None:
    pair = make_pair(kind, shape, seed=1, motion=24)
    assert 23.9 < length(pair.displacement).max() < 24.5
    assert length(pair.displacement).mean() > 6  # a large part moves, not a corner
    for u in (pair.displacement, pair.inverse):
        assert ndv_percent(u) == folds_percent(u) == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (24, 40, 32)])
def test_no_fold_even_at_the_largest_motion(shape: tuple[int, ...], seed: int) -> None:
    motion = LARGEST_MOTION * min(shape)
    pair = make_pair("mr", shape, seed=seed, motion=motion)
    assert length(pair.displacement).max() == pytest.approx(motion, rel=0.02)
    assert ndv_percent(pair.displacement) == ndv_percent(pair.inverse) == 0


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_backward_undoes_the_motion_exactly_and_its_determinant_is_positive(dim: int, seed: int) -> None:
    phi = random_motion(np.random.default_rng(seed), [64] * dim, motion=25)
    q = unit_grid([17] * dim)
    np.testing.assert_allclose(phi.backward(phi.forward(q)), q, atol=1e-11)
    step = 1e-5 * np.eye(dim).reshape(dim, dim, *[1] * dim)
    columns = [(phi.forward(q + e) - phi.forward(q - e)) / 2e-5 for e in step]
    assert np.linalg.det(np.moveaxis(np.stack(columns, 1), (0, 1), (-2, -1))).min() > 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_on_average_the_shift_grows_along_axis_1(dim: int) -> None:
    q = unit_grid([17] * dim)
    phis = [random_motion(np.random.default_rng(seed), [64] * dim, motion=25) for seed in range(24)]
    shift = np.mean([np.abs((phi.forward(q) - q)[1]) for phi in phis], axis=0)
    profile = np.moveaxis(shift, 1, 0).reshape(17, -1).mean(1)
    assert profile[-1] > 1.8 * profile[0]
    assert (np.diff(profile[4:]) > 0).all()


def residual(kind: str, shape: tuple[int, ...], *, motion: float) -> tuple[float, float]:
    """Mean and median of abs(moving(x + u) - fixed) without scanner or noise, as a share of what there was before."""
    rng = np.random.default_rng(5)
    anatomy = KINDS[kind][0](rng, len(shape))
    phi = random_motion(rng, shape, motion=motion)
    grid = unit_grid(shape)
    half = (np.array(shape) - 1).reshape(-1, *[1] * len(shape)) / 2
    fixed, moving = (paint(anatomy, tissue)[1] for tissue in (grid, phi.backward(grid)))
    left = np.abs(pull(moving, (phi.forward(grid) - grid) * half) - fixed)
    seen = ~np.isnan(left)
    assert seen.mean() > 0.5
    before = np.abs(moving - fixed)[seen].mean()
    return float(left[seen].mean() / before), float(np.median(left[seen]) / before)


@pytest.mark.parametrize(("kind", "shape"), [("ultrasound", SHAPES[0]), ("mr", SHAPES[0]), ("mr", SHAPES[1])])
def test_without_noise_the_moving_image_at_x_plus_u_is_the_fixed_image(kind: str, shape: tuple[int, ...]) -> None:
    mean, median = residual(kind, shape, motion=22)
    assert median < 0.004  # inside the tissues
    assert mean < 0.2  # linear interpolation blurs their borders
    if len(shape) == 2:  # borders are lines: twice the voxels per side, half the share of the border
        finer, _ = residual(kind, (128, 128), motion=44)
        assert finer < 0.65 * mean


@every_shape
def test_landmarks_follow_the_motion(shape: tuple[int, ...]) -> None:
    pair = make_pair("mr", shape, seed=3, motion=24)
    u = np.stack([map_coordinates(c, pair.fixed_landmarks.T, order=3) for c in pair.displacement], 1)
    np.testing.assert_allclose(pair.fixed_landmarks + u, pair.moving_landmarks, atol=0.05)
    assert len(pair.fixed_landmarks) >= 5
    for points in (pair.fixed_landmarks, pair.moving_landmarks):
        assert (points >= 0).all() and (points <= 63).all()


@pytest.mark.parametrize("motion", [0, -3, 29, float("nan")])
def test_an_impossible_motion_says_what_to_give(motion: float) -> None:
    with pytest.raises(InputError, match="motion of .* at most 28.8"):
        make_pair("mr", (64, 64), seed=0, motion=motion)


def test_a_cohort_keeps_its_motion_on_disk_and_in_its_record(tmp_path: Path) -> None:
    out = write_cohort(tmp_path / "c", kind="mr", shape=(64, 64), n_pairs=1, seed=2, motion=21)
    header = nibabel.Nifti1Image.from_filename(out / "displacements" / "case_000.nii.gz")
    vectors = header.get_fdata()[:, :, 0, 0]  # 1 mm voxels whose LPS mm are their indices
    assert 20.9 < np.linalg.norm(vectors, axis=-1).max() < 21.5
    files = [out / f"{side}_landmarks" / "case_000.csv" for side in ("fixed", "moving")]
    points = [np.loadtxt(file, delimiter=",", skiprows=1) for file in files]
    u = np.stack([map_coordinates(vectors[..., i], points[0].T, order=3) for i in range(2)], 1)
    np.testing.assert_allclose(points[0] + u, points[1], atol=0.05)
    assert '"motion": 21.0' in (out / "phantom.json").read_text()
    with pytest.raises(ValueError, match="holds something else"):
        write_cohort(out, kind="mr", shape=(64, 64), n_pairs=1, seed=2)


def test_a_cohort_from_before_there_was_motion_is_still_the_same_cohort(tmp_path: Path) -> None:
    out = write_cohort(tmp_path / "c", shape=(16, 16), n_pairs=1)
    record = '{"format": 1, "kind": "ultrasound", "shape": [16, 16], "n_pairs": 1, "seed": 0}\n'
    assert (out / "phantom.json").read_text() == record

"""The answers are exact, the noise is the scanner's own, and other tools read the files right."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel
import numpy as np
import pytest
from scipy.ndimage import (
    binary_erosion,
    gaussian_filter,
    map_coordinates,
    maximum_filter,
    minimum_filter,
)

from regpipe.phantoms.cohort import write_cohort
from regpipe.phantoms.motion import random_deformation, unit_grid
from regpipe.phantoms.scenes import KINDS, Phantom, make_pair

SHAPES = ((64, 64), (48, 40), (24, 20, 28))
everywhere = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def pull(image: np.ndarray, u: np.ndarray, *, order: int) -> np.ndarray:
    """image(x + u(x)), by scipy."""
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"))
    return map_coordinates(image, grid + u, order=order, mode="nearest")


def dice(a: np.ndarray, b: np.ndarray) -> float:
    labels = [n for n in np.unique(a) if n]
    return float(np.mean([2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in labels]))


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_backward_undoes_forward_exactly(dim: int, seed: int) -> None:
    phi = random_deformation(np.random.default_rng(seed), dim)
    q = unit_grid([17] * dim)
    np.testing.assert_allclose(phi.backward(phi.forward(q)), q, atol=1e-12)
    np.testing.assert_allclose(phi.forward(phi.backward(q)), q, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_jacobian_is_the_product_of_its_factors_and_positive(dim: int, seed: int) -> None:
    phi = random_deformation(np.random.default_rng(seed), dim)
    q = unit_grid([17] * dim)
    step = 1e-5 * np.eye(dim).reshape(dim, dim, *[1] * dim)
    columns = [(phi.forward(q + e) - phi.forward(q - e)) / 2e-5 for e in step]
    measured = np.linalg.det(np.moveaxis(np.stack(columns, 1), (0, 1), (-2, -1)))
    # det of a coupling is exp(s) where it acts; det expm(G) = exp(trace G)
    log_det, at = np.full(q.shape[1:], np.trace(phi.generator)), q
    for coupling in phi.couplings:
        log_det, at = log_det + coupling.log_scale(at), coupling.forward(at)
    np.testing.assert_allclose(measured, np.exp(log_det), rtol=1e-6)
    assert measured.min() > 0.2
    assert measured.std() > 0.02  # not merely an affine


@everywhere
@every_shape
def test_the_stored_inverse_undoes_the_stored_displacement(kind: str, shape: tuple[int, ...]) -> None:
    pair = make_pair(kind, shape, seed=1)
    back = np.stack([pull(c, pair.displacement, order=3) for c in pair.inverse])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    rim = np.array(shape).reshape(-1, *[1] * len(shape)) - 6
    inside = ((grid + pair.displacement >= 5) & (grid + pair.displacement <= rim)).all(0)
    assert inside.mean() > 0.1
    # cubic interpolation of the inverse is all that is left
    assert np.abs(pair.displacement + back)[:, inside].max() < (1e-3 if min(shape) >= 48 else 2e-2)


@everywhere
@every_shape
def test_the_moving_label_at_x_plus_u_is_the_fixed_label(kind: str, shape: tuple[int, ...]) -> None:
    pair = make_pair(kind, shape, seed=2)
    warped = pull(pair.moving_label, pair.displacement, order=0)
    size = 5  # two voxels off every edge and rim: rounding to the nearest voxel cannot reach another label
    flat = minimum_filter(pair.fixed_label, size) == maximum_filter(pair.fixed_label, size, mode="constant", cval=255)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) + pair.displacement
    seen = np.all([(g >= 0) & (g <= n - 1) for g, n in zip(grid, shape, strict=True)], axis=0)
    np.testing.assert_array_equal(warped[flat & seen], pair.fixed_label[flat & seen])


@everywhere
@pytest.mark.parametrize("dim", [2, 3])
def test_registration_is_needed_and_the_answer_registers(kind: str, dim: int) -> None:
    shape = (64, 64) if dim == 2 else (48, 48, 48)
    pairs = [make_pair(kind, shape, seed=s) for s in range(8 if dim == 2 else 4)]
    before = np.mean([dice(p.fixed_label, p.moving_label) for p in pairs])
    after = np.mean([dice(p.fixed_label, pull(p.moving_label, p.displacement, order=0)) for p in pairs])
    assert 0.5 < before < 0.82
    assert after > 0.9
    assert all(len(np.unique(p.fixed_label)) > 4 for p in pairs)


@everywhere
@every_shape
def test_landmarks_follow_the_displacement(kind: str, shape: tuple[int, ...]) -> None:
    pair = make_pair(kind, shape, seed=3)
    u = [map_coordinates(c, pair.fixed_landmarks.T, order=3) for c in pair.displacement]
    np.testing.assert_allclose(pair.fixed_landmarks + np.stack(u, 1), pair.moving_landmarks, atol=0.05)
    assert len(pair.fixed_landmarks) >= 10
    for points in (pair.fixed_landmarks, pair.moving_landmarks):
        assert (points >= 0).all() and (points <= np.array(shape) - 1).all()


def test_speckle_stays_with_the_scanner_while_anatomy_follows() -> None:
    pair = make_pair("ultrasound", (160, 160), seed=4)
    warped = pull(pair.moving_image, pair.displacement, order=1)
    organ = binary_erosion(pair.fixed_label == 1, iterations=6)
    fine = [image - gaussian_filter(image, 3) for image in (pair.fixed_image, warped)]
    assert organ.sum() > 1000
    assert abs(np.corrcoef(fine[0][organ], fine[1][organ])[0, 1]) < 0.1
    organs = pair.fixed_label > 0
    smooth = [gaussian_filter(image, 3)[organs] for image in (pair.fixed_image, warped)]
    assert np.corrcoef(smooth)[0, 1] > 0.9


def test_without_deformation_only_the_noise_differs() -> None:
    pair = make_pair("ultrasound", (64, 64), seed=5, magnitude=0)
    assert not pair.displacement.any()
    np.testing.assert_array_equal(pair.fixed_label, pair.moving_label)
    assert np.abs(pair.fixed_image - pair.moving_image).mean() > 0.02


def test_speckle_has_the_spread_of_a_log_compressed_rayleigh_envelope() -> None:
    # 20 log10 of a Rayleigh variable has standard deviation (20 / ln 10) * pi / sqrt(24) = 5.57 dB
    pair = make_pair("ultrasound", (200, 200), seed=6)
    organ = binary_erosion(pair.fixed_label == 1, iterations=14)
    fine = (pair.fixed_image - gaussian_filter(pair.fixed_image, 8)) * 55
    assert fine[organ].std() == pytest.approx(5.57, rel=0.12)


@everywhere
def test_magnitude_is_about_the_mean_displacement(kind: str) -> None:
    for magnitude in (0.02, 0.06):
        pairs = [make_pair(kind, (64, 64), seed=s, magnitude=magnitude) for s in range(3)]
        mean = np.mean([np.linalg.norm(p.displacement, axis=0).mean() for p in pairs])
        assert mean / 63 == pytest.approx(magnitude, rel=0.15)


@everywhere
def test_types_and_ranges_are_as_promised(kind: str) -> None:
    pair = make_pair(kind, (32, 24, 16), seed=0)
    for image in (pair.fixed_image, pair.moving_image):
        assert image.shape == (32, 24, 16) and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05
    assert pair.fixed_label.dtype == pair.moving_label.dtype == np.uint8
    fields = (pair.displacement, pair.inverse)
    assert all(u.shape == (3, 32, 24, 16) and u.dtype == np.float32 for u in fields)
    assert pair.fixed_landmarks.shape == pair.moving_landmarks.shape
    assert pair.fixed_landmarks.shape[1] == 3 and pair.fixed_landmarks.dtype == np.float32


def as_bytes(pair: Phantom) -> list[bytes]:
    return [array.tobytes() for array in pair]


@everywhere
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(kind: str) -> None:
    first = as_bytes(make_pair(kind, (32, 32), seed=7))
    assert first == as_bytes(make_pair(kind, (32, 32), seed=7))
    assert all(a != b for a, b in zip(first, as_bytes(make_pair(kind, (32, 32), seed=8)), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cohort_has_the_same_bytes_wherever_it_is_written(tmp_path: Path) -> None:
    one = write_cohort(tmp_path / "deep" / "one", shape=(32, 32), n_pairs=2, seed=3)
    two = write_cohort(tmp_path / "two", shape=(32, 32), n_pairs=2, seed=3)
    assert contents(one) == contents(two)
    assert len(contents(one)) == 2 * 7 + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "two"]  # nothing left aside


def test_a_cohort_is_reused_and_never_overwrites_anything_else(tmp_path: Path) -> None:
    out = write_cohort(tmp_path / "a", shape=(16, 16), n_pairs=1)
    (out / "mark").touch()
    assert (write_cohort(out, shape=(16, 16), n_pairs=1) / "mark").exists()
    with pytest.raises(ValueError, match="holds something else"):
        write_cohort(out, shape=(16, 16), n_pairs=1, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ValueError, match="mine: holds something else"):
        write_cohort(tmp_path / "mine", shape=(16, 16), n_pairs=1)


def test_a_cohort_broken_off_leaves_nothing_that_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regpipe.phantoms.cohort._write_case", fail)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path / "a", shape=(16, 16), n_pairs=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 16)])
def test_nibabel_and_itk_read_the_images_in_lps_equal_to_the_index(tmp_path: Path, shape: tuple[int, ...]) -> None:
    out = write_cohort(tmp_path / "c", kind="mr", shape=shape, n_pairs=1, seed=9)
    pair = make_pair("mr", shape, seed=(9, 0))
    path = str(out / "moving_images" / "case_000.nii.gz")
    np.testing.assert_array_equal(
        nibabel.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32), pair.moving_image
    )
    image = itk.imread(path)
    np.testing.assert_array_equal(itk.array_from_image(image).T, pair.moving_image)
    index = [3, 5, 7][: len(shape)]
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), index, atol=1e-6)
    label = nibabel.Nifti1Image.from_filename(out / "fixed_labels" / "case_000.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), pair.fixed_label)
    assert label.get_data_dtype() == np.uint8
    points = np.loadtxt(out / "moving_landmarks" / "case_000.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(points, pair.moving_landmarks, rtol=1e-6)


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 16)])
def test_itk_resamples_by_the_displacement_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    out = write_cohort(tmp_path / "c", kind="mr", shape=shape, n_pairs=1, seed=9)
    pair, dim = make_pair("mr", shape, seed=(9, 0)), len(shape)
    path = str(out / "displacements" / "case_000.nii.gz")
    header = nibabel.Nifti1Image.from_filename(path).header
    assert header["dim"][0] == 5 and header["intent_code"] == 1007
    field = itk.imread(path, itk.Vector[itk.F, dim])
    moving = itk.imread(str(out / "moving_images" / "case_000.nii.gz"), itk.F)
    warped = itk.warp_image_filter(moving, displacement_field=field, output_parameters_from_image=field)
    expected = pull(pair.moving_image, pair.displacement, order=1)
    inside = (slice(6, -6),) * dim if dim == 2 else (slice(5, -5),) * dim
    np.testing.assert_allclose(itk.array_from_image(warped).T[inside], expected[inside], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape", "magnitude", "message"),
    [
        ("ct", (64, 64), 0.05, "there are: ultrasound, mr"),
        ("mr", (64,), 0.05, "2 or 3 sides"),
        ("mr", (64, 8), 0.05, "at least 16"),
        ("mr", (64, 64), -1, "0 or more"),
    ],
)
def test_an_impossible_phantom_says_what_to_give(
    kind: str, shape: tuple[int, ...], magnitude: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_pair(kind, shape, seed=0, magnitude=magnitude)

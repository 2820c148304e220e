"""Alignment: moves that are known, images stored in every way, landmarks by closed form. Distances in mm."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import itk
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from regpipe.io.images import Image
from regpipe.phantoms.scenes import make_pair
from regpipe.transforms.affine import STAGES, Alignment, align, from_landmarks
from regpipe.utils.errors import InputError

BLOBS = np.random.default_rng(5)
CENTRES = BLOBS.uniform(-26, 26, (14, 3))  # RAS mm; an object of about 80 mm without any symmetry
WIDTHS = BLOBS.uniform(6, 12, 14)
HEIGHTS = BLOBS.uniform(0.4, 1.0, 14)
BODY = np.random.default_rng(6).uniform(-30, 30, (400, 3))  # points of the object


def scene(points: np.ndarray) -> np.ndarray:
    """The object's brightness at points (..., D) in RAS mm: a closed form, never interpolated."""
    dim = points.shape[-1]
    squared = sum((points[..., i, None] - CENTRES[:, i]) ** 2 for i in range(dim))
    return np.exp(-squared / (2 * WIDTHS**2)) @ HEIGHTS


def placed(axes: np.ndarray, spacing: Sequence[float], shape: Sequence[int], middle: Sequence[float]) -> np.ndarray:
    """Affine of a grid with these directions (columns) and this middle."""
    affine = np.eye(len(shape) + 1)
    affine[:-1, :-1] = axes * np.array(spacing)
    affine[:-1, -1] = np.array(middle) - affine[:-1, :-1] @ (np.array(shape) - 1) / 2
    return affine


def scan(affine: np.ndarray, shape: Sequence[int], truth: np.ndarray | None = None) -> Image:
    """The object as a scanner with this grid sees it, after ``truth`` (fixed -> moving) has moved it."""
    grid = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    back = np.eye(len(affine)) if truth is None else np.linalg.inv(truth)
    return Image(scene(apply_affine(back, grid)).astype(np.float32), affine)


def turned(angles: Sequence[float], dim: int) -> np.ndarray:
    """A rotation by degrees: about x, y, z in 3-D, about z in 2-D."""
    return Rotation.from_euler("xyz", [*([0] * (3 - len(angles))), *angles], degrees=True).as_matrix()[:dim, :dim]


def moved(linear: np.ndarray, shift: Sequence[float]) -> np.ndarray:
    matrix = np.eye(len(linear) + 1)
    matrix[:-1, :-1], matrix[:-1, -1] = linear, shift
    return matrix


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """How far apart two matrices put the object's points, on average."""
    body = BODY[:, : len(truth) - 1]
    return float(np.linalg.norm(apply_affine(found, body) - apply_affine(truth, body), axis=1).mean())


def flipped(image: Image, order: Sequence[int], flips: Sequence[int]) -> Image:
    """The same image with its axes in another order and some of them backwards."""
    array = np.flip(image.array.transpose(order), [i for i, f in enumerate(flips) if f < 0])
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        change[axis, i] = flip
        change[axis, 3] = 0 if flip > 0 else array.shape[i] - 1
    return Image(np.ascontiguousarray(array), image.affine @ change)


FIXED_SHAPE, MOVING_SHAPE = (36, 40, 32), (40, 34, 28)
FIXED = scan(placed(np.eye(3), (2.4, 2.2, 2.6), FIXED_SHAPE, (0, 0, 0)), FIXED_SHAPE)
OBLIQUE = turned((10, -20, 30), 3) @ np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]])  # and axes exchanged and flipped
OFFSET = (25.0, -12.0, 10.0)  # 30 mm
TURN = turned((8, -9, 9), 3)  # 15 degrees in all
MOVES = {
    "rigid": moved(TURN, OFFSET),
    "similarity": moved(1.12 * TURN, OFFSET),
    "affine": moved(TURN @ np.array([[1.1, 0.08, 0], [0, 0.92, -0.06], [0.04, 0, 1.05]]), OFFSET),
}


def moving_image(stage: str, *, mirrored: bool = False) -> Image:
    """The object moved by ``MOVES``, on an oblique grid of another size whose middle is not the object's."""
    axes = OBLIQUE * [-1, 1, 1] if mirrored else OBLIQUE
    affine = placed(axes, (2.6, 2.9, 3.2), MOVING_SHAPE, np.add(OFFSET, (4, -3, 5)).tolist())
    return scan(affine, MOVING_SHAPE, MOVES[stage])


@pytest.fixture(scope="module")
def rigid() -> Alignment:
    return align(FIXED, moving_image("rigid"), "rigid")


def test_a_rigid_move_is_found(rigid: Alignment) -> None:
    turn = rigid.matrix[:3, :3]
    assert error(np.eye(4), MOVES["rigid"]) > 25
    assert error(rigid.matrix, MOVES["rigid"]) < 0.3
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    assert rigid.after > rigid.before
    assert 0.6 < rigid.overlap <= 1


@pytest.mark.parametrize(("stage", "metric"), [("similarity", "mi"), ("affine", "mi"), ("affine", "ncc")])
def test_a_scaled_or_sheared_move_is_found_and_is_of_its_class(stage: str, metric: str) -> None:
    found = align(FIXED, moving_image(stage), stage, metric=metric).matrix
    assert error(found, MOVES[stage]) < 0.5
    if stage == "similarity":
        gram = found[:3, :3] @ found[:3, :3].T
        assert np.allclose(gram, gram[0, 0] * np.eye(3), atol=1e-6)
        assert gram[0, 0] == pytest.approx(1.12**2, rel=0.01)


def test_an_image_stored_in_another_orientation_gives_the_same_matrix(rigid: Alignment) -> None:
    stored = flipped(moving_image("rigid"), (2, 0, 1), (-1, 1, -1))
    assert np.linalg.det(flipped(FIXED, (1, 0, 2), (1, 1, 1)).affine) < 0  # left-handed
    found = align(flipped(FIXED, (1, 0, 2), (1, 1, 1)), stored, "rigid")
    assert error(found.matrix, rigid.matrix) < 1e-3


def test_a_grid_laid_in_space_left_handedly_shows_the_same_move() -> None:
    mirrored = moving_image("rigid", mirrored=True)
    assert np.linalg.det(mirrored.affine[:3, :3]) * np.linalg.det(moving_image("rigid").affine[:3, :3]) < 0
    assert error(align(FIXED, mirrored, "rigid").matrix, MOVES["rigid"]) < 0.3


def test_the_same_arguments_give_the_same_matrix_on_any_number_of_threads(rigid: Alignment) -> None:
    threads = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    try:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(4 if threads == 1 else 1)
        again = align(FIXED, moving_image("rigid"), "rigid")
    finally:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
    # to the bit in a process that did nothing else; where it has read many files elastix differs in the ninth digit
    assert error(again.matrix, rigid.matrix) < 1e-6
    other = align(FIXED, moving_image("rigid"), "rigid", seed=7)
    assert (other.matrix != rigid.matrix).any()
    assert error(other.matrix, rigid.matrix) < 0.3


def test_intensities_of_another_scale_and_sign_still_align() -> None:
    moving = moving_image("rigid")
    negative = moving._replace(array=30000 - 1e4 * moving.array)
    assert error(align(FIXED, negative, "rigid").matrix, MOVES["rigid"]) < 0.5


def test_masks_keep_what_does_not_move_with_the_object_out() -> None:
    # A bright plate that stays where it is, in the moving image under the object: alone it asks for the identity.
    fixed, moving = FIXED, moving_image("rigid")
    plates = [
        apply_affine(i.affine, np.moveaxis(np.indices(i.array.shape), 0, -1))[..., 1] < -34 for i in (fixed, moving)
    ]
    dirty = [
        i._replace(array=np.where(p, np.float32(6), i.array)) for i, p in zip((fixed, moving), plates, strict=True)
    ]
    found = align(dirty[0], dirty[1], "rigid", fixed_mask=~plates[0], moving_mask=~plates[1])
    assert error(found.matrix, MOVES["rigid"]) < 0.5
    assert found.overlap < 1
    unmasked = align(dirty[0], dirty[1], "rigid")
    assert error(unmasked.matrix, MOVES["rigid"]) > 2 * error(found.matrix, MOVES["rigid"])


@pytest.mark.parametrize("stage", ["rigid", "affine"])
def test_pictures_align_as_well(stage: str) -> None:
    spacing = np.diag([-1.0, -1.0, 1.0])
    fixed = scan(placed(-np.eye(2), (2, 2), (40, 38), (0, 0)), (40, 38))
    linear = turned((15,), 2) if stage == "rigid" else turned((15,), 2) @ np.array([[1.1, 0.1], [0, 0.9]])
    truth = moved(linear, (18, -20))
    moving = scan(placed(-np.eye(2), (2.5, 2.5), (36, 40), (20, -22)), (36, 40), truth)
    assert np.sign(np.diag(fixed.affine)).tolist() == np.diag(spacing).tolist()
    assert error(align(fixed, moving, stage).matrix, truth) < 0.5


@pytest.mark.parametrize("shape", [(48, 48), (32, 32, 32)])
def test_a_small_image_is_found_from_one_start_five_voxels_away(shape: tuple[int, ...]) -> None:
    image = make_pair("mr", shape, seed=0).fixed_image
    truth = moved(turned((2,), len(shape)), [4.0, -3.0, 0.0][: len(shape)])
    fixed, moving = (Image(image, place) for place in (np.eye(len(truth)), truth))
    found = align(fixed, moving, "rigid", start=np.eye(len(truth))).matrix
    assert error(np.eye(len(truth)), truth) > 4
    assert error(found, truth) < 0.2


def test_an_image_aligned_with_itself_stays_where_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "regpipe.transforms.affine"):
        found = align(FIXED, FIXED, "rigid")
    assert (found.matrix == np.eye(4)).all()  # nothing is more similar than the same
    assert found.before == found.after
    assert found.overlap == 1
    assert "no improvement" in caplog.text


def test_stages_none_and_centre_move_by_what_the_headers_say() -> None:
    moving = moving_image("rigid")
    assert (align(FIXED, moving, "none").matrix == np.eye(4)).all()
    start = moved(np.eye(3), (5, 0, 0))
    assert (align(FIXED, moving, "none", start=start).matrix == start).all()
    assert np.allclose(align(FIXED, moving, "centre").matrix, moved(np.eye(3), np.add(OFFSET, (4, -3, 5)).tolist()))


def test_overlap_is_the_dice_of_the_fields_of_view() -> None:
    # Cubes of 36, 40, 32 voxels; half of the first axis apart: a half remains, 2 * 0.5 / (1 + 1).
    shifted = FIXED._replace(affine=moved(np.eye(3), (18 * 2.4, 0, 0)) @ FIXED.affine)
    assert align(FIXED, shifted, "none").overlap == pytest.approx(0.5, abs=1e-6)
    doubled = moved(2 * np.eye(3), (0, 0, 0))  # the same moving image covers an eighth: 2 * 1/8 / (1 + 1/8)
    assert align(FIXED, FIXED, "none", start=doubled).overlap == pytest.approx(2 / 9, rel=0.1)


def test_little_overlap_warns_and_none_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    near, far = (FIXED._replace(affine=moved(np.eye(3), (mm, 0, 0)) @ FIXED.affine) for mm in (70, 500))
    align(FIXED, near, "none")
    assert "overlap by 0.19" in caplog.text
    with pytest.raises(InputError, match="share no place.*'centre'"):
        align(FIXED, far, "none")
    assert align(FIXED, far, "centre").overlap == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fixed_mask": np.zeros(FIXED_SHAPE)}, "fixed mask: is empty"),
        ({"moving_mask": np.ones((3, 3, 3))}, "moving mask: shape"),
        ({"stage": "bspline"}, "stage 'bspline' is unknown"),
        ({"metric": "ssd"}, "metric 'ssd' is unknown"),
        ({"stage": "centre", "start": np.eye(4)}, "takes no start"),
        ({"start": np.eye(3)}, "start: shape"),
        ({"moving": Image(FIXED.array[..., 0], np.eye(3))}, "2-D moving image"),
    ],
)
def test_mistakes_are_told_in_a_line(change: dict, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        align(**({"fixed": FIXED, "moving": FIXED} | change))
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- landmarks

LINEAR = {"centre": np.eye(3), "rigid": TURN, "similarity": 1.12 * TURN, "affine": MOVES["affine"][:3, :3]}
FLAT = {
    "centre": np.eye(2),
    "rigid": turned((20,), 2),
    "similarity": 1.3 * turned((20,), 2),
    "affine": [[1.1, 0.2], [0, 0.8]],
}


def lps(points: np.ndarray) -> np.ndarray:
    """RAS <-> LPS of points (K, D)."""
    return points * np.array([-1, -1, 1])[: points.shape[1]]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("stage", ["centre", "rigid", "similarity", "affine"])
def test_exact_landmarks_give_the_exact_matrix(stage: str, dim: int) -> None:
    truth = moved(np.array((LINEAR if dim == 3 else FLAT)[stage]), OFFSET[:dim])
    points = np.random.default_rng(1).uniform(-50, 50, (6, dim))
    target = apply_affine(truth, points)
    points[1], target[3, 0] = np.nan, np.nan  # each seen in one image only
    assert np.allclose(from_landmarks(lps(points), lps(target), stage), truth, atol=1e-9)


def test_noisy_landmarks_give_what_other_tools_find() -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(-50, 50, (9, 3))
    y = apply_affine(MOVES["affine"], x) + rng.normal(0, 3, x.shape)
    rotation, _ = Rotation.align_vectors(y - y.mean(0), x - x.mean(0))
    assert np.allclose(from_landmarks(lps(x), lps(y), "rigid")[:3, :3], rotation.as_matrix(), atol=1e-9)
    landmarks = (points.ravel().tolist() for points in (x, y))
    transform = sitk.LandmarkBasedTransformInitializer(sitk.AffineTransform(3), *landmarks)
    places = np.array([transform.TransformPoint(p.tolist()) for p in x])
    assert np.allclose(apply_affine(from_landmarks(lps(x), lps(y), "affine"), x), places, atol=1e-6)


def test_each_stage_fits_noisy_landmarks_at_least_as_well_and_at_its_best() -> None:
    rng = np.random.default_rng(3)
    x = rng.uniform(-50, 50, (12, 3))
    y = apply_affine(MOVES["affine"], x) + rng.normal(0, 2, x.shape)

    def misfit(matrix: np.ndarray) -> float:
        return float(((apply_affine(matrix, x) - y) ** 2).sum())

    fits = {stage: from_landmarks(lps(x), lps(y), stage) for stage in STAGES}
    misfits = [misfit(fits[stage]) for stage in STAGES]
    assert misfits == sorted(misfits, reverse=True)
    for change in (moved(turned((0.3, 0, 0), 3), (0, 0, 0)), moved(1.002 * np.eye(3), (0, 0, 0))):
        for nudge in (change, np.linalg.inv(change)):  # about the landmarks' middle: no stage gains by its own moves
            middle = moved(np.eye(3), y.mean(0).tolist())
            assert misfit(middle @ nudge @ np.linalg.inv(middle) @ fits["similarity"]) > misfit(fits["similarity"])


def test_mirrored_landmarks_do_not_turn_a_rigid_map_into_a_mirror() -> None:
    x = np.random.default_rng(4).uniform(-50, 50, (7, 3))
    for stage in ("rigid", "similarity"):
        assert np.linalg.det(from_landmarks(x, x * [-1, 1, 1], stage)[:3, :3]) > 0


@pytest.mark.parametrize(
    ("fixed", "stage", "told"),
    [
        (np.eye(3)[:2], "rigid", "2 are known in both images; this stage needs 3"),
        (np.eye(3), "affine", "3 are known in both images; this stage needs 4"),
        (np.full((5, 3), np.nan), "centre", "0 are known"),
        (np.arange(5)[:, None] * np.ones(3), "similarity", "lie on one point, line or plane"),
        (np.ones((5, 3)), "rigid", "lie on one point"),
        (np.eye(5, 3) * [1, 1, 0], "affine", "lie on one point, line or plane"),
        (np.eye(3), "elastic", "stage 'elastic' is unknown"),
    ],
)
def test_landmarks_that_do_not_determine_the_matrix_are_refused(fixed: np.ndarray, stage: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        from_landmarks(fixed, fixed, stage)


def test_unlike_numbers_of_landmarks_are_refused() -> None:
    with pytest.raises(InputError, match="give the same places in both"):
        from_landmarks(np.eye(3), np.eye(4, 3), "rigid")


def test_landmarks_of_a_few_mm_error_begin_a_turn_by_120_degrees() -> None:
    far = moved(turned((0, 0, 120), 3), OFFSET)
    moving = scan(placed(OBLIQUE, (2.6, 2.9, 3.2), MOVING_SHAPE, OFFSET), MOVING_SHAPE, far)
    seen = BODY[:6]
    rough = apply_affine(far, seen) + np.random.default_rng(0).normal(0, 3, seen.shape)
    start = from_landmarks(lps(seen), lps(rough), "rigid")
    assert error(start, far) > 1
    assert error(align(FIXED, moving, "rigid", start=start).matrix, far) < 0.3

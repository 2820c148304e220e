from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage, stats

from regpipe.fields.algebra import Registration, integrate_both, warp
from regpipe.metrics import measures
from regpipe.metrics.measured import measure
from regpipe.metrics.metric import columns


def boxes(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Two 10 x 10 boxes of label 3, the second ``shift`` voxels further along axis 0."""
    fixed, moved = np.zeros((1, 32, 32), int), np.zeros((1, 32, 32), int)
    fixed[0, 8:18, 10:20] = 3
    moved[0, 8 + shift : 18 + shift, 10:20] = 3
    return fixed, moved


def smooth_velocity(shape: tuple[int, ...], *, amplitude: float, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).standard_normal((len(shape), *shape))
    smooth = np.stack([ndimage.gaussian_filter(n, 4, mode="reflect") for n in noise])
    return torch.from_numpy(smooth / np.abs(smooth).max() * amplitude).float()[None]


def one_displaced_pixel(by: float) -> torch.Tensor:
    u = torch.zeros(2, 9, 9)
    u[0, 4, 4] = by
    return u


def test_only_labels_of_both_images_are_shared_and_never_the_background():
    fixed, moving = np.array([[0, 1, 2, 5]]), np.array([[0, 2, 5, 7]])
    assert measures.shared_labels(fixed, moving) == [2, 5]


def test_dice_of_shifted_boxes_is_their_overlap():
    # 10 - 3 of 10 rows overlap, both boxes are equally large.
    assert measures.dice(*boxes(3), [3]) == {3: pytest.approx(0.7)}
    assert measures.dice(*boxes(10), [3]) == {3: 0.0}


def test_dice_of_a_half_that_lies_within_the_whole_is_two_thirds():
    # 2 * 50 of 100 + 50 pixels, whichever of them is the fixed one.
    whole, _ = boxes(0)
    half = whole.copy()
    half[0, 13:] = 0
    assert measures.dice(whole, half, [3]) == measures.dice(half, whole, [3]) == {3: pytest.approx(2 / 3)}


def test_dice_of_a_label_that_neither_holds_is_nan_and_of_a_vanished_one_zero():
    fixed, _ = boxes(0)
    assert math.isnan(measures.dice(fixed, fixed, [4])[4])
    assert measures.dice(fixed, np.zeros_like(fixed), [3]) == {3: 0.0}


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.5, 1.0), (0.5, 3.0)])
def test_hd95_of_boxes_shifted_along_an_axis_is_the_shift_in_mm_of_that_axis(spacing):
    # The far face (10 of 36 rim pixels, more than 5 %) is exactly the shift away, unless the other
    # axis offers a shorter way, and it does not: beside the box there is no surface.
    assert measures.hd95(*boxes(2), [3], spacing)[3] == pytest.approx(2 * spacing[0])


def hd95_by_its_definition(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    """The larger of both directed 95th percentiles of distances between rims, by scipy's distance transform."""
    rims = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    to_a, to_b = (ndimage.distance_transform_edt(~rim, sampling=spacing) for rim in rims)
    return float(max(np.percentile(to_b[rims[0]], 95), np.percentile(to_a[rims[1]], 95)))


def test_hd95_is_its_definition_and_not_the_largest_distance():
    blob = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((48, 40)), 3) > 0.02
    moved = ndimage.gaussian_filter(np.random.default_rng(2).standard_normal((48, 40)), 3) > 0.02
    found = measures.hd95(blob[None].astype(int), moved[None].astype(int), [1], (1.5, 0.7))[1]
    assert found == pytest.approx(hd95_by_its_definition(blob, moved, (1.5, 0.7)), rel=1e-5)
    # One stray pixel among 37 of a rim is less than 5 % of it.
    whole, _ = boxes(0)
    stray = whole.copy()
    stray[0, 30, 30] = 3
    assert measures.hd95(whole, stray, [3], (1.0, 1.0)) == {3: 0}


@pytest.mark.parametrize("shape", [(40, 33), (24, 20, 18)])
def test_hd95_is_monais_to_the_bit_also_of_structures_at_the_images_rim(shape):
    spacing = (1.1, 0.7, 2.3)[: len(shape)]
    rng = np.random.default_rng(3)
    one, other = ((3 * ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0.2).astype(int) for _ in range(2))
    other[:2] = 1
    masks = [torch.from_numpy(mask)[None, None] for mask in (other, one)]
    theirs = compute_hausdorff_distance(masks[0], masks[1], include_background=True, percentile=95, spacing=spacing)
    expected = theirs.item()
    assert expected > 0 and measures.hd95(one, other, [1], spacing) == {1: expected}


def test_hd95_in_3d_takes_the_spacing_of_its_own_axis():
    fixed, moved = np.zeros((12, 12, 12), int), np.zeros((12, 12, 12), int)
    fixed[3:8, 3:8, 3:8] = 1
    moved[3:8, 3:8, 5:10] = 1
    assert measures.hd95(fixed, moved, [1], (1.0, 1.0, 0.7))[1] == pytest.approx(1.4)


def test_hd95_of_a_vanished_label_is_nan():
    fixed, _ = boxes(0)
    assert math.isnan(measures.hd95(fixed, np.zeros_like(fixed), [3], (1, 1))[3])


def test_tre_is_zero_where_the_translation_is_known_and_its_length_in_mm_where_it_is_not():
    p = torch.tensor([[4.0, 5.0, 6.0], [7.5, 2.25, 3.0]])
    shift = torch.tensor([1.0, 2.0, -2.0])
    u = shift.view(3, 1, 1, 1).expand(3, 12, 12, 12)
    spacing = (1.0, 2.0, 0.5)
    np.testing.assert_allclose(measures.tre(p, p + shift, u, spacing), [0, 0], atol=1e-5)
    # sqrt(1^2 + 4^2 + 1^2)
    expected = [math.sqrt(18)] * 2
    np.testing.assert_allclose(measures.tre(p, p + shift, 0 * u, spacing), expected, rtol=1e-6)


def test_tre_of_a_turned_moving_image_is_the_length_that_its_matrix_makes():
    # A voxel along axis 0 is 2 mm along y, one along axis 1 is 3 mm along -x.
    mm = np.array([[0.0, -3.0], [2.0, 0.0]])
    p = np.array([[4.0, 5.0], [4.0, 5.0], [4.0, 5.0]])
    q = p + np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(measures.tre(p, q, np.zeros((2, 9, 9)), mm), [2, 3, math.hypot(2, 3)], rtol=1e-6)


def test_tre_drops_landmarks_that_either_image_lacks():
    p = np.array([[1, 1], [2, 2], [np.nan, np.nan]], np.float32)
    q = np.array([[1, 1], [np.nan, 2], [3, 3]], np.float32)
    assert measures.tre(p, q, np.zeros((2, 5, 5)), (1, 1)).tolist() == [0]
    assert len(measures.tre(p[:0], q[:0], np.zeros((2, 5, 5)), (1, 1))) == 0


def test_ncc_knows_affine_intensity_and_opposites():
    a = np.random.default_rng(0).random((1, 8, 8))
    assert measures.ncc(a, 3 * a + 2) == pytest.approx(1)
    assert measures.ncc(a, -a) == pytest.approx(-1)
    assert measures.ncc(a, np.ones_like(a)) == 0


def linear(matrix: list[list[float]], shape: tuple[int, ...]) -> np.ndarray:
    """u(x) = (A - I) x."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)
    return np.tensordot(np.array(matrix) - np.eye(len(shape)), grid, axes=1)


def test_u_of_minus_2x_folds_everywhere_in_3d():
    # x -> -x has determinant (-1)^3; every simplex is flipped onto its own volume.
    u = linear((-np.eye(3)).tolist(), (5, 6, 7))
    assert measures.folds_percent(u) == 100
    assert measures.ndv_percent(u) == pytest.approx(100)


def test_tre_reads_the_displacement_at_the_fixed_point():
    matrix = [[1.2, 0.1], [-0.3, 0.8]]
    p = np.random.default_rng(6).uniform(1, 8, (5, 2))
    q = p @ np.array(matrix).T
    np.testing.assert_allclose(measures.tre(p, q, linear(matrix, (10, 10)), (1.0, 1.0)), 0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
def test_a_grid_that_is_squeezed_flat_is_folded_everywhere_and_covers_nothing(shape):
    matrix = np.eye(len(shape))
    matrix[0, 0] = 0
    assert measures.folds_percent(linear(matrix.tolist(), shape)) == 100
    assert measures.ndv_percent(linear(matrix.tolist(), shape)) == 0


def test_in_2d_u_of_minus_2x_is_half_a_turn_and_folds_nowhere():
    u = linear((-np.eye(2)).tolist(), (5, 6))
    assert measures.folds_percent(u) == 0
    assert measures.ndv_percent(u) == 0


@pytest.mark.parametrize("shape", [(9, 7), (9, 5, 6)])
def test_ndv_of_a_stretched_mirror_image_is_the_volume_it_covers(shape):
    # One axis flipped and stretched by 1.5: each flipped unit cell covers 1.5 of its volume.
    matrix = np.eye(len(shape))
    matrix[0, 0] = -1.5
    assert measures.ndv_percent(linear(matrix.tolist(), shape)) == pytest.approx(150)


@pytest.mark.parametrize("shape", [(9, 7), (9, 5, 6)])
def test_ndv_counts_one_flipped_slab_of_cells(shape):
    # phi(x) = x, then one step of -0.5 between x = 4 and x = 5, then steps of 1: the slab of cells
    # there, one of 8, covers half its volume upside down.
    u = np.zeros((len(shape), *shape))
    u[0, 5:] = -1.5
    assert measures.ndv_percent(u) == pytest.approx(100 * 0.5 / 8)


@pytest.mark.parametrize("shape", [(24, 20), (16, 18, 14)])
def test_a_gentle_diffeomorphism_has_neither_folds_nor_volume(shape):
    u, _ = integrate_both(smooth_velocity(shape, amplitude=2.0))
    assert measures.folds_percent(u[0]) == 0
    assert measures.ndv_percent(u[0]) == 0


def test_ndv_sees_the_displaced_pixel_that_central_differences_skip():
    # The neighbours see 1 +- 1.5 / 2 > 0. But in the two cells ahead of the pixel the edge that
    # leaves it has length 1 - 1.5 = -0.5, and both its corners have determinant -0.5: each cell
    # loses 2 triangles of area 0.25, averaged over the two ways to cut it.
    u = one_displaced_pixel(1.5)
    assert measures.folds_percent(u) == 0
    assert measures.ndv_percent(u) == pytest.approx(100 * 2 * (2 * 0.25 / 2) / 64)


@pytest.mark.parametrize("shape", [(33, 33), (17, 17, 17)])
def test_ndv_sees_a_checkerboard_that_central_differences_take_for_the_identity(shape):
    # Alternating +-0.8 under a smooth window; central differences see the window's slope alone.
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    window = np.prod(np.sin(np.pi * grid / (shape[0] - 1)), axis=0) ** 2
    u = np.zeros((len(shape), *shape))
    u[0] = 0.8 * window * (-1.0) ** grid.sum(0)
    assert measures.folds_percent(u) == 0
    assert measures.ndv_percent(u) > 0.1


def test_ndv_of_a_cube_with_a_pushed_corner_counts_the_central_tetrahedron():
    # A unit cube with its corner 000 pushed by t (1, 1, 1). Its own determinant is 1 - 3 t, that of
    # its three neighbours 1 - t, that of the central tetrahedron (000; 011, 101, 110) 2 - 3 t, as
    # its far face lies where x + y + z = 2; the others hold still. Hence t = 0.4 flips the corner
    # (-0.2) alone, and t = 0.7 the corner (-1.1) and the central tetrahedron (-0.1).
    def push(t: float) -> np.ndarray:
        u = np.zeros((3, 2, 2, 2))
        u[:, 0, 0, 0] = t
        return u

    assert measures.ndv_percent(push(0.4)) == pytest.approx(100 * 0.2 / 12, rel=1e-5)
    assert measures.ndv_percent(push(0.7)) == pytest.approx(100 * (1.1 + 0.1) / 12, rel=1e-4)
    # The opposite corner pushed back is the same by symmetry.
    mirrored = -push(0.7)[:, ::-1, ::-1, ::-1].copy()
    assert measures.ndv_percent(mirrored) == pytest.approx(100 * 1.2 / 12, rel=1e-4)


def test_a_broken_field_is_not_called_free_of_folds():
    assert measures.folds_percent(np.full((2, 4, 4), np.nan)) == 100


def test_sdlogj_of_a_linear_map_is_zero():
    u = linear([[1.2, 0.1], [-0.3, 0.8]], (9, 8))
    assert measures.sdlogj(u) == pytest.approx(0, abs=1e-5)
    assert measures.sdlogj_l2r(u) == pytest.approx(0, abs=1e-5)


def test_sdlogj_of_an_exponential_stretch_is_that_of_a_ramp():
    # phi(x) = exp(k x) / k has log phi' = k x: on n points its std is k sqrt((n^2 - 1) / 12), and
    # central differences only scale phi' by sinh(k) / k. The rim is one-sided: hence the margin.
    n, k = 401, 0.002
    x = np.arange(n)
    u = np.zeros((2, n, 4))
    u[0] = (np.exp(k * x) / k - x)[:, None]
    assert measures.sdlogj(u) == pytest.approx(k * math.sqrt((n**2 - 1) / 12), rel=1e-2)


def test_sdlogj_is_the_spread_of_the_voxels_there_are():
    # Of a field on 5 x 4 voxels, by numpy: divided by their number, as none of them is a sample.
    u = 0.3 * np.random.default_rng(4).random((2, 5, 4))
    jacobian = np.eye(2) + np.moveaxis(np.array([np.gradient(part) for part in u]), (0, 1), (-2, -1))
    assert measures.sdlogj(u) == pytest.approx(np.log(np.linalg.det(jacobian)).std(), rel=1e-4)


def l2r_by_its_definition(u: np.ndarray) -> float:
    """Learn2Reg's evaluation written out: correlation with (-1/2, 0, 1/2), crop, + 3, clip, log."""
    dim = len(u)
    gradient = np.empty((dim, dim, *u.shape[1:]))
    for i in range(dim):
        for j in range(dim):
            gradient[i, j] = ndimage.correlate1d(u[i], [-0.5, 0, 0.5], axis=j, mode="constant")
    jacobian = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(dim)
    inner = np.linalg.det(jacobian)[(slice(2, -2),) * dim]
    return float(np.log((inner + 3).clip(1e-9, 1e9)).std())


@pytest.mark.parametrize("shape", [(20, 24), (14, 12, 13)])
def test_the_learn2reg_number_follows_its_published_definition(shape):
    u = smooth_velocity(shape, amplitude=6.0)[0].double().numpy()
    assert measures.sdlogj_l2r(u) == pytest.approx(l2r_by_its_definition(u), rel=1e-4)
    assert measures.sdlogj_l2r(u) < measures.sdlogj(u) / 2


def test_the_learn2reg_number_of_a_grid_that_is_all_rim_is_nan():
    assert math.isnan(measures.sdlogj_l2r(np.zeros((2, 4, 9))))


def test_inverse_consistency_of_a_translation_pair_is_zero_and_of_a_wrong_one_its_length_in_mm():
    u = torch.tensor([3.0, -1.0]).view(2, 1, 1).expand(2, 10, 12)
    spacing = (2.0, 0.5)
    assert measures.inverse_consistency(u, -u, spacing) == pytest.approx(0, abs=1e-5)
    # u after itself moves (6, -2) voxels = (12, -1) mm.
    assert measures.inverse_consistency(u, u, spacing) == pytest.approx(math.hypot(12, 1), rel=1e-5)


def test_the_bootstrap_interval_is_scipys_and_close_to_the_normal_one():
    values = np.random.default_rng(3).normal(5, 2, 200)
    mean, low, high = measures.bootstrap_interval([*values, math.nan], seed=7)
    oracle = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=7).confidence_interval
    assert (mean, low, high) == pytest.approx((values.mean(), oracle.low, oracle.high))
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)


def test_the_bootstrap_interval_of_few_values_is_honest():
    assert measures.bootstrap_interval([0.5, math.nan]) == (0.5, 0.5, 0.5)
    assert all(math.isnan(x) for x in measures.bootstrap_interval([]))


def translated_case(shift: int) -> tuple[Registration, dict]:
    """A box and its image ``shift`` voxels further, with the displacement that undoes it."""
    fixed, moving = (torch.from_numpy(x)[None] for x in boxes(shift))
    u = torch.zeros(1, 2, 32, 32)
    u[:, 0] = shift
    image, moving_image = fixed.float(), moving.float()
    points = torch.tensor([[[10.0, 12.0], [15.0, 18.0], [math.nan, math.nan]]])
    item = {
        "case": ["box"],
        "fixed_image": image,
        "moving_image": moving_image,
        "fixed_label": fixed.to(torch.int16),
        "moving_label": moving.to(torch.int16),
        "fixed_landmarks": points,
        "moving_landmarks": points + torch.tensor([shift, 0]),
    }
    return Registration(u, u, -u, warp(moving_image, u), warp(image, -u)), item


def test_measure_knows_a_translation_before_and_after():
    row = measure(*translated_case(3), (2.0, 1.0))
    assert list(row) == list(columns())
    expected = {"dice_before": 0.7, "dice": 1, "hd95_before": 6, "hd95": 0, "tre_before": 6}
    expected |= {"tre": 0, "ncc": 1, "folds_percent": 0, "ndv_percent": 0, "sdlogj": 0}
    expected |= {"sdlogj_l2r": 0, "inverse_consistency": 0}
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-5)
    assert row["ncc_before"] < 0.8


def test_measure_gives_nan_for_what_a_case_does_not_have():
    registration, item = translated_case(3)
    item["fixed_label"] = torch.zeros_like(item["fixed_label"])
    item["fixed_landmarks"] = item["moving_landmarks"] = torch.zeros(1, 0, 2)
    row = measure(registration, item, (1.0, 1.0))
    missing = {name for name, value in row.items() if math.isnan(value)}
    assert missing == {"dice_before", "dice", "hd95_before", "hd95", "tre_before", "tre"}

"""Homographies as algebra: the split, the bend and its fields by closed form; what folds is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from regpipe.io.geometry import carry
from regpipe.transforms.homography import after, bent, is_gentle, split

SHAPE = (40, 32)
FRAME = np.array([[-1.5, 0.0, 40.0], [0.0, 2.0, -25.0], [0, 0, 1]])
P = np.array([[1.0, -0.2, 12.0], [0.15, 0.95, -9.0], [4e-3, -3e-3, 1.0]])
GRID = np.indices(SHAPE, dtype=float)
AT = GRID.reshape(2, -1).T


def wave(size: float) -> np.ndarray:
    """A smooth displacement (2, *SHAPE) of at most about ``size`` voxels."""
    x, y = GRID
    return size * np.stack([np.sin(x / 9) * np.cos(y / 7), np.cos(x / 8 + y / 10)])


def points(field: np.ndarray) -> np.ndarray:
    return field.reshape(2, -1).T


def test_points_of_numpy_and_torch_go_where_the_formula_says() -> None:
    # (10, 20) -> (10 - 4 + 12, 1.5 + 19 - 9) / (0.04 - 0.06 + 1)
    expected = np.array([18.0, 11.5]) / 0.98
    assert np.allclose(carry(P, np.array([[10.0, 20.0]])), expected, rtol=1e-15)
    assert np.allclose(carry(torch.from_numpy(P), torch.tensor([[10.0, 20.0]], dtype=torch.double)), expected)
    assert np.isnan(carry(P, np.array([[np.nan, 1.0]]))).all()


def test_frame_and_bend_together_are_the_homography_and_alone_the_frame_is_the_best_affine_map() -> None:
    frame, bend = split(P, FRAME, SHAPE)
    truth = carry(P, apply_affine(FRAME, AT))
    assert np.allclose(apply_affine(frame, carry(bend, AT)), truth, atol=1e-10)
    assert (frame[-1] == [0, 0, 1]).all()
    assert bend[-1] @ [19.5, 15.5, 1] == pytest.approx(1)
    best = np.linalg.lstsq(np.c_[AT, np.ones(len(AT))], truth, rcond=None)[0].T
    left = [np.sqrt(((apply_affine(m, AT) - truth) ** 2).sum(1).mean()) for m in (frame, np.vstack([best, [0, 0, 1]]))]
    assert left[0] > 1.9 and left[0] < 1.05 * left[1]  # mm; fitted at fewer points


def test_any_factor_of_the_matrix_gives_the_same_split() -> None:
    for found, again in zip(split(P, FRAME, SHAPE), split(-3 * P, FRAME, SHAPE), strict=True):
        assert np.allclose(found, again, atol=1e-9)


def test_an_affine_matrix_has_no_bend() -> None:
    matrix = np.array([[1.1, 0.1, 3], [-0.1, 0.9, 4], [0, 0, 1.0]])
    frame, bend = split(matrix, FRAME, SHAPE)
    assert (bend == np.eye(3)).all()
    assert (frame == matrix @ FRAME).all()


def test_bent_fields_are_the_composition_and_lie_where_the_frames_say() -> None:
    frame, bend = split(P, FRAME, SHAPE)
    u, v = wave(1.5), wave(-1.2)
    (forward, inverse), (fixed_frame, moving_frame) = bent(u, v, (FRAME, frame), bend)
    shift = np.linalg.inv(FRAME) @ fixed_frame  # whole voxels, the same in both images
    assert np.allclose(shift, np.linalg.inv(frame) @ moving_frame) and np.allclose(shift, np.rint(shift))
    first = np.rint(-shift[:2, 2]).astype(int)
    inner = (slice(None), *(slice(a, a + n) for a, n in zip(first, SHAPE, strict=True)))
    moved = carry(bend, AT + points(u))
    assert np.allclose(AT + points(forward[inner]), moved, atol=1e-9)
    assert (moved >= -first).all() and (moved <= np.array(forward.shape[1:]) - first - 1).all()  # all on the grown grid
    # At y = R(x) of a voxel x the inverse is x + v(x): closed form, nothing interpolated, by a field of one value.
    constant = np.broadcast_to(np.array([0.7, -0.4])[:, None, None], (2, *SHAPE))
    (_, back), _ = bent(u, constant, (FRAME, frame), bend)
    y = AT + points(back[inner])
    assert np.allclose(y, carry(np.linalg.inv(bend), AT) + [0.7, -0.4], atol=1e-9)


def test_there_and_back_is_where_one_was_out_to_the_rim() -> None:
    from scipy.ndimage import map_coordinates

    frame, bend = split(P, FRAME, SHAPE)
    shift = np.broadcast_to(np.array([1.5, -2.0])[:, None, None], (2, *SHAPE))
    (forward, inverse), (fixed_frame, _) = bent(shift, -shift, (FRAME, frame), bend)
    first = np.rint((np.linalg.inv(FRAME) @ fixed_frame)[:2, 2])
    at = AT - first
    there = at + np.stack([map_coordinates(c, at.T, order=1) for c in forward], 1)
    back = there + np.stack([map_coordinates(c, there.T, order=1, mode="nearest") for c in inverse], 1)
    assert np.linalg.norm(back - at, axis=1).max() < 0.02


def test_a_field_carried_by_the_bend_and_its_inverse_is_itself() -> None:
    _, bend = split(P, FRAME, SHAPE)
    assert np.allclose(after(after(wave(1.0), bend), np.linalg.inv(bend)), wave(1.0), atol=1e-9)


@pytest.mark.parametrize(
    ("row", "gentle"),
    [
        ([0, 0, 1], True),
        ([4e-3, -3e-3, 1], True),
        ([-4e-3, 3e-3, -1], True),  # the first column's and row's sign does not matter: one factor
        ([0.05, 0, 1], False),  # vanishes at x = -20 mm, on the grid
        ([0.025, 0, 0.66], False),  # at x = -26.4 mm, off the grid; over it from 0.2 to 1.66
    ],
)
def test_a_homography_that_folds_or_nearly_does_on_the_grid_is_told(row: list[float], gentle: bool) -> None:
    matrix = np.vstack([P[:2], row])
    assert is_gentle(matrix, FRAME, SHAPE) is gentle

"""LPS, and axes turned upright: what lies at a place stays there."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from regpipe.io.geometry import flipped, lps_matrix, upright


def oblique(dim: int) -> np.ndarray:
    """Axes in another order, one backwards, 20 degrees off, voxels of unequal sides."""
    turn = Rotation.from_euler("zyx", [20, 10 * (dim > 2), 0], degrees=True).as_matrix()[:dim, :dim]
    affine = np.eye(dim + 1)
    affine[:-1, :-1] = turn @ np.eye(dim)[:, ::-1] @ np.diag([-1.5, 1.0, 2.0][:dim])
    affine[:-1, -1] = [5.0, -3.0, 7.0][:dim]
    return affine


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("pictures", [True, False])
def test_upright_axes_run_to_the_right_anterior_and_up_and_values_keep_their_places(dim: int, pictures: bool) -> None:
    array, affine = np.random.default_rng(dim).random((5, 6, 7)[:dim]), oblique(dim)
    turned, placed = upright(array, affine, pictures=pictures)
    directions = np.diag(placed)[:-1] * (-1 if dim == 2 and pictures else 1)  # of pictures: left and posterior
    assert (directions > 0).all()
    index = np.moveaxis(np.indices(turned.shape), 0, -1).reshape(-1, dim)
    before = np.rint(apply_affine(np.linalg.inv(affine) @ placed, index)).astype(int)
    assert np.array_equal(turned.ravel(), array[tuple(before.T)])


def test_a_map_of_points_is_the_same_map_in_lps() -> None:
    matrix, points = oblique(3), np.random.default_rng(0).random((4, 3))
    assert np.allclose(apply_affine(lps_matrix(matrix), flipped(points)), flipped(apply_affine(matrix, points)))
    assert np.allclose(apply_affine(lps_matrix(matrix, places=False), points), flipped(apply_affine(matrix, points)))

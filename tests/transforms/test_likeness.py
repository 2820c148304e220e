"""What two images are compared on."""

from __future__ import annotations

import itk
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from regpipe.io.itk_bridge import from_itk, to_itk
from regpipe.transforms.likeness import Side, reduced


@pytest.mark.parametrize("shape", [(45, 33), (41, 29, 23)])
def test_an_image_is_reduced_as_itk_reduces_it_to_the_bit(shape: tuple[int, ...]) -> None:
    dim, affine = len(shape), np.eye(len(shape) + 1)
    turn = Rotation.from_euler("zyx", [20, -10 * (dim - 2), 15 * (dim - 2)], degrees=True).as_matrix()
    affine[:dim, :dim] = turn[:dim, :dim] * [1, 1.3, 2][:dim]
    affine[:dim, dim] = -20
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    small = reduced(Side(array, array > 0, affine), 10)
    factors = [n // k for n, k in zip(shape, small.array.shape, strict=True)]
    truth = from_itk(itk.bin_shrink_image_filter(to_itk(array, affine), shrink_factors=factors))
    assert max(factors) > 1
    np.testing.assert_array_equal(small.array, truth.array)
    np.testing.assert_array_equal(small.affine, truth.affine)

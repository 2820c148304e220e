"""Means over a group by closed form: logarithms that sum to zero, coverage, votes, the slope of a ramp."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import expm, logm

from regpipe.group.means import Votes, log_sum, mean_image, sharpness, without_mean
from regpipe.utils.errors import InputError


def matrices(n: int = 5, dim: int = 3) -> list[np.ndarray]:
    """Affine maps that are not small: turns of tens of degrees, scales of a third, shifts of centimetres."""
    rng = np.random.default_rng(3)
    logs = rng.normal(0, 0.25, (n, dim + 1, dim + 1))
    logs[:, :-1, -1] *= 80
    logs[:, -1] = 0
    return [expm(log) for log in logs]


def test_the_logarithms_sum_to_zero_and_what_the_subjects_say_of_each_other_stays() -> None:
    before = matrices()
    after = without_mean(before)
    assert np.abs(sum(logm(matrix).real for matrix in after)).max() < 1e-8 and log_sum(after) < 1e-8
    assert log_sum(before) > 0.05
    for i in range(1, len(before)):
        assert np.allclose(after[0] @ np.linalg.inv(after[i]), before[0] @ np.linalg.inv(before[i]), atol=1e-7)


def test_of_shifts_the_mean_is_taken_off_and_any_order_gives_the_same() -> None:
    shifts = np.array([[10.0, 0], [4, 3], [-2, 9]])
    given = [np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) for x, y in shifts]
    after = without_mean(given)
    assert np.allclose([matrix[:2, 2] for matrix in after], shifts - shifts.mean(axis=0))
    again = without_mean(given[::-1])[::-1]
    assert np.allclose(after, again, rtol=0, atol=1e-12)


def test_a_mirror_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="one orientation"):
        without_mean([np.diag([-1.0, 1, 1]), np.eye(3)])


def test_a_voxel_is_the_mean_of_those_who_see_it() -> None:
    one = np.array([2.0, 4, 0, 0]), np.array([1.0, 1, 0, 0])
    two = np.array([4.0, 0, 6, 0]), np.array([1.0, 0, 1, 0])
    mean = mean_image([one, two])
    assert mean.image.tolist() == [3, 4, 6, 0] and mean.covered.tolist() == [1, 0.5, 0.5, 0]
    rim = mean_image([(np.array([0.4]), np.array([0.1])), (np.array([0.0]), np.array([0.0]))])
    assert rim.image.tolist() == [0]  # a tenth of one of two is nobody


def test_most_votes_win_and_the_lowest_id_among_equals() -> None:
    votes = Votes((4,))
    for labels in ([1, 2, 0, 7], [1, 7, 0, 2], [2, 0, 7, 0]):
        votes.add(np.array(labels, np.int32))
    assert votes.won().tolist() == [1, 0, 0, 0]
    assert votes.probability(7) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("shape", [(20, 16), (12, 14, 10)])
def test_sharpness_of_a_ramp_is_its_slope_per_mm(shape: tuple[int, ...]) -> None:
    ramp = 3.0 * np.indices(shape)[0].astype(float) + 1000
    inner = sharpness(ramp, [2.0] * len(shape))
    # the first and last plane see one step in place of two
    assert inner == pytest.approx(1.5 * (shape[0] - 1) / shape[0], rel=1e-6)

"""Homographies: known ones found from images, exact ones from landmarks. Errors are in pixels of the moving image."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from helpers.plane import FIXED, FIXED_SHAPE, LPS, MOVING, MOVING_SHAPE, TRUTH, best_affine, errors
from regpipe.io.geometry import carry
from regpipe.io.images import Image
from regpipe.transforms.projective import align_projective, from_landmarks
from regpipe.utils.errors import InputError


def test_a_known_homography_is_found_where_the_best_affine_map_leaves_many_pixels() -> None:
    assert errors(best_affine())[[0, -1]].min() > 3  # at two corners
    found = align_projective(FIXED, MOVING, best_affine())
    assert errors(found.matrix).mean() < 0.1 and errors(found.matrix).max() < 0.4
    assert found.after > found.before and found.overlap > 0.7


def test_the_axes_of_the_files_may_be_exchanged_and_turned() -> None:
    to_first = np.array(
        [[0, -1, FIXED_SHAPE[0] - 1], [1, 0, 0], [0, 0, 1]]
    )  # index of the turned array -> of the first
    turned = Image(np.ascontiguousarray(FIXED.array[::-1].T), FIXED.affine @ to_first)
    assert errors(align_projective(turned, MOVING, best_affine()).matrix).mean() < 0.1


def test_masks_keep_what_does_not_belong_to_the_plane_out() -> None:
    # A bright ruler in front of the moving view, at rest in its pixels; in the fixed view it lies elsewhere.
    ruler, own = np.zeros(MOVING_SHAPE, bool), np.zeros(FIXED_SHAPE, bool)
    ruler[:, 40:60], own[70:90] = True, True
    moving = MOVING._replace(array=np.where(ruler, np.float32(5), MOVING.array))
    fixed = FIXED._replace(array=np.where(own, np.float32(4), FIXED.array))
    masked = align_projective(fixed, moving, best_affine(), fixed_mask=~own, moving_mask=~ruler)
    bare = align_projective(fixed, moving, best_affine())
    assert errors(masked.matrix).mean() < 0.5 < errors(bare.matrix).mean()


def test_what_is_no_improvement_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    noise = MOVING._replace(array=np.random.default_rng(0).random(MOVING_SHAPE).astype(np.float32))
    with caplog.at_level(logging.INFO, "regpipe.transforms.projective"):
        kept = align_projective(FIXED, FIXED, np.eye(3))
        lost = align_projective(FIXED, noise, best_affine())
    assert (kept.matrix == np.eye(3)).all() and kept.before == kept.after
    assert lost.after >= lost.before
    assert "is kept" in caplog.text


def test_a_volume_is_refused_and_a_missing_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Image(np.zeros((8, 8, 8), np.float32), np.eye(4))
    with pytest.raises(InputError, match="projective is for 2D images; use affine"):
        align_projective(volume, volume, np.eye(4))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install regpipe\[projective\]"):
        align_projective(FIXED, MOVING, np.eye(3))


# -------------------------------------------------------------------------------------------------- landmarks


@pytest.mark.parametrize("count", [4, 9])
def test_exact_landmarks_give_the_exact_homography(count: int) -> None:
    x = np.random.default_rng(count).uniform(-50, 50, (count + 2, 2))
    y = carry(TRUTH, x)
    x[1], y[3, 0] = np.nan, np.nan  # each seen in one image only
    assert errors(from_landmarks(x * LPS, y * LPS)).max() < 1e-6


def test_noisy_landmarks_give_what_opencv_finds_and_nothing_near_fits_better() -> None:
    import cv2

    rng = np.random.default_rng(2)
    x = rng.uniform(-50, 50, (12, 2))
    y = carry(TRUTH, x) + rng.normal(0, 0.5, x.shape)
    found = from_landmarks(x * LPS, y * LPS)
    theirs, _ = cv2.findHomography(x, y, 0)
    assert errors(found, theirs).max() < 0.02  # theirs stops earlier, in single precision

    def misfit(matrix: np.ndarray) -> float:
        return float(((carry(matrix, x) - y) ** 2).sum())

    assert misfit(found) <= misfit(theirs) + 1e-9
    for i in range(8):
        nudge = np.zeros(9)
        nudge[i] = 1e-3 * [1, 1, 50, 1, 1, 50, 1e-2, 1e-2][i]
        assert min(misfit(found + sign * nudge.reshape(3, 3)) for sign in (1, -1)) > misfit(found)


SQUARE = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])


@pytest.mark.parametrize(
    ("fixed", "moving", "told"),
    [
        (SQUARE[:3], SQUARE[:3], "3 are known in both images; projective needs 4"),
        (SQUARE * [1, 0], SQUARE, "too many lie on one line"),
        (np.array([[0.0, 0], [5, 0], [10, 0], [0, 10]]), SQUARE, "too many lie on one line"),
        (SQUARE, np.array([[0.0, 0], [5, 0], [10, 0], [0, 10]]), "too many lie on one line"),
        (np.r_[SQUARE[:1] + np.arange(5)[:, None] * [1, 2], [[0, 9]]],) * 2 + ("too many lie on one line",),
        (np.ones((5, 2)), np.ones((5, 2)), "too many lie on one line"),
        (np.ones((5, 3)), np.ones((5, 3)), "x and y"),
        (SQUARE, SQUARE[:3], "give the same places in both"),
    ],
)
def test_landmarks_that_do_not_determine_a_homography_are_refused(
    fixed: np.ndarray, moving: np.ndarray, told: str
) -> None:
    with pytest.raises(InputError, match=told) as caught:
        from_landmarks(fixed, moving)
    assert "\n" not in str(caught.value)


def test_three_on_a_line_do_no_harm_amid_others() -> None:
    x = np.vstack([SQUARE, [[5, 0], [3, 7]]])
    assert errors(from_landmarks(x * LPS, carry(TRUTH, x) * LPS)).max() < 1e-6

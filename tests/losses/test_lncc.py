"""Local correlation against its definition, scipy and MONAI; its closed gradient; masks, floors, offsets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from scipy.ndimage import uniform_filter

from helpers.terms import box, noise, smooth, two
from regpipe.losses.lncc import box_sum, lncc

SHAPES = [(20, 17), (12, 10, 11)]
EACH = pytest.mark.parametrize("shape", SHAPES)


def correlations(a: np.ndarray, b: np.ndarray, window: int, inside: np.ndarray | None = None) -> np.ndarray:
    """Squared correlation in each window, cut off at the rim and the mask: the definition, voxel by voxel."""
    half, out = window // 2, np.zeros(a.shape)
    seen = np.ones(a.shape, bool) if inside is None else inside
    for where in np.argwhere(seen):
        cut = tuple(slice(max(i - half, 0), i + half + 1) for i in where)
        out[tuple(where)] = np.corrcoef(a[cut][seen[cut]], b[cut][seen[cut]])[0, 1] ** 2
    return out


@pytest.mark.parametrize(("shape", "window"), list(itertools.product(SHAPES, (1, 3, 9, 25))))
def test_box_sums_are_those_of_scipy_also_where_the_window_exceeds_the_image(shape, window) -> None:
    x = noise(2, 3, *shape)
    expected = uniform_filter(x.double().numpy(), size=[1, 1] + [window] * len(shape), mode="constant")
    assert np.allclose(box_sum(x, window), expected * window ** len(shape), rtol=1e-4, atol=1e-4)


@EACH
def test_lncc_is_its_definition_and_inside_it_is_monais(shape) -> None:
    a, b = two(shape)
    squared = correlations(a[0, 0].numpy(), b[0, 0].numpy(), 5)
    # epsilon / variance = 1e-5 / 0.04 per image is what the two definitions may differ by
    assert float(lncc(a, b, window=5)) == pytest.approx(1 - squared.mean(), abs=1e-3)
    peer = LocalNormalizedCrossCorrelationLoss(len(shape), kernel_size=5, smooth_nr=0.0, reduction="none")
    inner = tuple(slice(2, -2) for _ in shape)
    assert np.allclose(-peer(a, b)[0, 0].numpy()[inner], squared[inner], atol=1e-3)


@EACH
def test_the_gradient_of_lncc_is_monais_far_from_the_rim(shape) -> None:
    a, b = two(shape)
    peer = LocalNormalizedCrossCorrelationLoss(len(shape), kernel_size=5, smooth_dr=1e-9)
    gradients = []
    for loss in (lambda x: lncc(x, b, window=5, floors=(1e-9, 1e-9)), lambda x: peer(x, b)):
        x = a.clone().requires_grad_()
        loss(x).backward()
        assert x.grad is not None
        inner = tuple(slice(4, -4) for _ in shape)
        gradients.append(x.grad[0, 0][inner])
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@EACH
def test_lncc_in_a_mask_correlates_only_voxels_inside_it(shape) -> None:
    a, b = two(shape)
    inside = smooth(1, 1, shape, seed=5) > 0.45
    squared = correlations(a[0, 0].numpy(), b[0, 0].numpy(), 5, inside[0, 0].numpy())
    expected = 1 - squared[inside[0, 0].numpy()].mean()
    garbage = torch.where(inside, b, 9 * noise(*b.shape, seed=6))
    for other in (b, garbage):
        assert float(lncc(a, other, mask=inside.float(), window=5)) == pytest.approx(expected, abs=2e-3)


@EACH
def test_lncc_of_an_image_with_itself_is_0_whatever_the_gain_and_the_offset(shape) -> None:
    a = noise(2, 1, *shape)
    local = 1 + smooth(1, 1, shape) * 0.01  # hardly changes within a window
    for b in (a, -a, 0.3 * a + 0.2, local * a, a + 1000):
        assert float(lncc(a, b, window=5)) == pytest.approx(0, abs=5e-3)


def test_each_images_variance_is_raised_by_its_own_floor() -> None:
    a, b = two((9, 8))
    covariance = np.cov(a.numpy().ravel(), b.numpy().ravel(), ddof=0)  # each window holds the whole image
    expected = 1 - covariance[0, 1] ** 2 / ((covariance[0, 0] + 0.02) * (covariance[1, 1] + 0.3))
    assert float(lncc(a, b, window=25, floors=(0.02, 0.3))) == pytest.approx(expected, rel=1e-4)
    by_pair = (torch.tensor([0.02, 5.0]), torch.tensor([0.3, 5.0]))
    both = [torch.cat([x, x]) for x in (a, b)]
    unlike = 1 - covariance[0, 1] ** 2 / ((covariance[0, 0] + 5) * (covariance[1, 1] + 5))
    assert float(lncc(*both, window=25, floors=by_pair)) == pytest.approx((expected + unlike) / 2, rel=1e-4)


def test_an_offset_of_1000_changes_neither_lncc_nor_its_gradient() -> None:
    a, b = noise(1, 1, 16, 16), noise(1, 1, 16, 16, seed=1)
    for mask in (None, box((16, 16), 12, 9)):
        for left, right in ((0, 0), (1000, 1000), (0, 1000), (1000, 0)):
            x = (a + left).requires_grad_()
            loss = lncc(x, b + right, mask=mask, window=5)
            (gradient,) = torch.autograd.grad(loss, x)
            if left == right == 0:
                plain, plain_gradient = loss.detach(), gradient
            assert float(loss.detach()) == pytest.approx(float(plain), abs=2e-3)
            assert float((gradient - plain_gradient).norm() / plain_gradient.norm()) < 0.02


def test_flat_windows_count_as_uncorrelated() -> None:
    flat, other = torch.full((1, 1, 12, 12), 0.3), noise(1, 1, 12, 12)
    for a, b in ((flat, other), (other, flat), (flat, flat), (torch.zeros_like(flat), flat)):
        for mask in (None, box((12, 12), 7, 12)):
            assert float(lncc(a, b, mask=mask)) == pytest.approx(1, abs=1e-4)

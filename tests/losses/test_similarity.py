"""Image similarities against their definitions, MONAI and ConvexAdam; with and without masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.terms import box, noise, smooth, two
from regpipe.losses.lncc import lncc
from regpipe.losses.similarity import feature_similarity, mi, mind, mind_ssc, mse, ncc
from regpipe.networks.encoders import Encoder

SHAPES = [(20, 17), (12, 10, 11)]
EACH = pytest.mark.parametrize("shape", SHAPES)


def features(a: Tensor, b: Tensor, *, mask: Tensor | None = None) -> Tensor:
    torch.manual_seed(0)
    return feature_similarity(a, b, Encoder("alexnet", a.ndim - 2).requires_grad_(False).eval(), mask=mask)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "lncc": partial(lncc, window=5),
    "ncc": ncc,
    "mse": mse,
    "mi": mi,
    "mind": mind,
    "features": features,
}
ALL = pytest.mark.parametrize("name", FUNCTIONS)


@ALL
def test_every_similarity_and_its_gradient_are_finite_on_flat_images(name) -> None:
    flat, other = torch.full((2, 1, 12, 12), 0.3), noise(2, 1, 12, 12)
    half_flat = torch.where(torch.arange(12) < 6, flat, other)
    for a, b in ((flat, other), (other, flat), (flat, flat), (torch.zeros_like(flat), flat), (half_flat, flat)):
        for mask in (None, box((12, 12), 7, 12).expand_as(flat), 0 * flat):
            x = a.clone().requires_grad_()
            loss = FUNCTIONS[name](x, b, mask=mask)
            loss.backward()
            assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(("name", "masked"), list(itertools.product(FUNCTIONS, (False, True))))
def test_the_gradient_is_that_of_finite_differences(name, masked) -> None:
    a, b = two((14, 14))
    a = (0.1 + 0.8 * a).requires_grad_()  # away from where mutual information clamps
    mask = smooth(1, 1, (14, 14), seed=3) if masked else None
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](a, b, mask=mask), a)
    step, length = 5e-4 * gradient / gradient.norm(), float(gradient.norm())  # the minimum in MIND has kinks
    with torch.no_grad():
        ahead, behind = (float(FUNCTIONS[name](a + h * step, b, mask=mask)) for h in (1, -1))
    assert (ahead - behind) / 1e-3 == pytest.approx(length, rel=0.02)


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(FUNCTIONS, SHAPES)))
def test_a_shifted_image_is_less_alike_than_the_image_itself(name, shape) -> None:
    a = smooth(1, 1, shape)
    same, shifted = (float(FUNCTIONS[name](a, b)) for b in (a, a.roll(3, 2)))
    assert same < shifted - 0.02 * abs(shifted)


@ALL
def test_similarities_are_the_same_to_the_bit_inside_an_autocast(name) -> None:
    a, b = two((20, 17))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = FUNCTIONS[name](a, b)
    assert inside.dtype == torch.float32 and float(inside) == float(FUNCTIONS[name](a, b))


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(FUNCTIONS, SHAPES)))
def test_a_mask_of_ones_is_no_mask(name, shape) -> None:
    a, b = two(shape, batch=2)
    masked = FUNCTIONS[name](a, b, mask=torch.ones_like(a))
    assert float(masked) == pytest.approx(float(FUNCTIONS[name](a, b)), rel=1e-4)


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(("lncc", "ncc", "mse", "mi"), SHAPES)))
def test_a_mask_that_is_a_box_is_the_image_cut_out(name, shape) -> None:
    a, b = two(shape)
    sizes = [n - 3 for n in shape]
    cut = (slice(None), slice(None), *[slice(n) for n in sizes])
    masked = FUNCTIONS[name](a, b, mask=box(shape, *sizes))
    assert float(masked) == pytest.approx(float(FUNCTIONS[name](a[cut], b[cut])), rel=1e-3)


def test_soft_weights_weigh() -> None:
    a, b, mask = (noise(1, 1, 9, 8, seed=i) for i in range(3))
    weights = mask.double().numpy().ravel()
    x, y = (image.double().numpy().ravel() for image in (a, b))
    assert float(mse(a, b, mask=mask)) == pytest.approx(np.average((x - y) ** 2, weights=weights), rel=1e-5)
    covariance = np.cov(x, y, aweights=weights, ddof=0)
    r = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert float(ncc(a, b, mask=mask)) == pytest.approx(1 - r, rel=1e-4)


@ALL
def test_an_empty_mask_gives_0_with_a_graph_and_in_a_batch_does_not_count(name) -> None:
    a, b = two((20, 17), batch=2)
    mask = box((20, 17), 20, 12)
    a.requires_grad_()
    nothing = FUNCTIONS[name](a, b, mask=torch.zeros_like(a))
    (gradient,) = torch.autograd.grad(nothing, a)
    assert float(nothing.detach()) == 0 and not gradient.any()
    with torch.no_grad():
        one, both = FUNCTIONS[name](a[:1], b[:1], mask=mask), FUNCTIONS[name](a, b, mask=torch.cat([mask, 0 * mask]))
    assert float(both) == pytest.approx(float(one), rel=1e-5)


def test_each_pair_counts_the_same_however_large_its_mask_is() -> None:
    zero = torch.zeros(2, 1, 10, 10)
    values = torch.tensor([0.2, 0.6]).view(2, 1, 1, 1).expand_as(zero)
    mask = torch.cat([box((10, 10), 1, 1), box((10, 10), 10, 10)])
    assert float(mse(zero, values, mask=mask)) == pytest.approx((0.04 + 0.36) / 2)


def test_ncc_is_one_minus_the_correlation_and_2_for_an_inverted_image() -> None:
    a, b = two((20, 17), batch=2)
    expected = [1 - np.corrcoef(x.numpy().ravel(), y.numpy().ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    assert float(ncc(a, b)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(ncc(a, 0.3 * a + 0.5)) == pytest.approx(0, abs=1e-5)
    assert float(ncc(a, 1 - a)) == pytest.approx(2, abs=1e-5)


def test_mutual_information_is_0_for_independent_images_and_the_same_for_inverted_ones() -> None:
    rows, columns = torch.linspace(0, 1, 24).view(1, 1, -1, 1), torch.linspace(0, 1, 24).view(1, 1, 1, -1)
    a, b = (rows + 0 * columns), (columns + 0 * rows)  # the joint histogram is a product
    assert float(mi(a, b)) == pytest.approx(0, abs=1e-4)
    assert float(mi(a, a)) == pytest.approx(float(mi(a, 1 - a)), rel=1e-4)
    assert float(mi(a, a)) < -1.5  # at most the log of 24 levels


def test_mutual_information_takes_the_voxels_that_a_soft_mask_holds_by_more_than_half() -> None:
    a, b = two((24, 20))
    mask = noise(1, 1, 24, 20, seed=3)
    assert float(mi(a, b, mask=mask)) == float(mi(a, b, mask=(mask > 0.5).float()))
    assert float(mi(a, b, mask=mask)) != float(mi(a, b))


def naive_mind(image: np.ndarray, radius: int, dilation: int) -> np.ndarray:
    """The definition, voxel by voxel and patch by patch -> (C, *shape)."""
    dim, shape = image.ndim, image.shape

    def at(where: np.ndarray) -> float:
        return image[tuple(np.clip(where, 0, np.array(shape) - 1))]

    steps = np.eye(dim, dtype=int) * dilation
    neighbours = []
    for i, j in itertools.combinations(range(dim), 2):
        neighbours += [(s * steps[i], t * steps[j]) for s, t in ((1, 1), (-1, -1), (1, -1), (-1, 1))]
    patch = [np.array(o) for o in itertools.product(range(-radius, radius + 1), repeat=dim)]
    ssd = np.zeros((len(neighbours), *shape))
    for c, (one, other) in enumerate(neighbours):
        for where in np.ndindex(shape):
            x = np.array(where)
            ssd[(c, *where)] = np.mean([(at(x + one + o) - at(x + other + o)) ** 2 for o in patch])
    ssd -= ssd.min(0)
    v = ssd.mean(0)
    return np.exp(-ssd / np.clip(v, 1e-3 * v.mean(), 1e3 * v.mean()))


def test_mutual_information_is_real_after_memory_was_predicted_with_it() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        mi(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    assert math.isfinite(float(mi(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))))


@pytest.mark.parametrize(
    ("shape", "radius", "dilation", "channels"),
    [((9, 8), 1, 2, 4), ((7, 8), 0, 1, 4), ((8, 9), 2, 1, 4), ((5, 6, 4), 1, 2, 12), ((4, 5, 5), 1, 1, 12)],
)
def test_mind_is_its_definition(shape, radius, dilation, channels) -> None:
    image = noise(2, 1, *shape)
    image[1, :, 4:] = 0.5 + 0.002 * image[1, :, 4:]  # partly all but flat, so that the lower bound of v acts
    found = mind_ssc(image, radius=radius, dilation=dilation)
    assert found.shape == (2, channels, *shape)
    for x, descriptor in zip(image, found, strict=True):
        expected = naive_mind(x[0].double().numpy(), radius, dilation)
        np.testing.assert_allclose(descriptor, expected, atol=2e-4)


def test_inside_the_image_mind_is_that_of_convexadam() -> None:
    peer = pytest.importorskip("convexAdam.convex_adam_utils", reason="needs the extra 'peers'")
    image = noise(1, 1, 13, 12, 14)
    for radius, dilation in ((1, 2), (2, 2)):
        theirs = peer.MINDSSC(image, radius, dilation, device="cpu")[..., 2:-2, 2:-2, 2:-2]
        ours = mind_ssc(image, radius=radius, dilation=dilation)[..., 2:-2, 2:-2, 2:-2]
        apart = (ours[0, :, None] - theirs[0, None]).abs().flatten(2).amax(2)  # each of ours from each of theirs
        assert sorted(apart.argmin(1).tolist()) == list(range(12)) and float(apart.amin(1).max()) < 1e-4


@EACH
def test_mind_does_not_see_gain_offset_or_inversion(shape) -> None:
    a = smooth(1, 1, shape)
    for b in (0.1 * a + 0.7, 1 - a, 100 * a - 3):
        assert float(mind(a, b)) < 1e-5 < 1e-3 < float(mind(a, b.roll(2, 2)))


def test_mind_far_from_a_masks_edge_does_not_see_what_lies_beyond() -> None:
    a, b = two((24, 17))
    b[:, :, 15:] = 0  # the mask ends at 12, a descriptor reaches 3 voxels
    changed = b.clone()
    changed[:, :, 15:] = noise(1, 1, 9, 17, seed=4) * 0.2
    mask = box((24, 17), 12, 17)
    assert float(mind(a, b, mask=mask)) == pytest.approx(float(mind(a, changed, mask=mask)), rel=1e-5)

"""Within the given labels a deformation is a rigid motion, to the last digit; around them it stays a diffeomorphism."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from regpipe.engines.rigid import held, labels_of
from regpipe.fields.algebra import compose, integrate, register
from regpipe.fields.folds import folded_cells
from regpipe.utils.errors import InputError

SIDE = 48


def strain(u: np.ndarray, fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """(*S, D, D): Green-Lagrange (F^T F - I) / 2 of x -> x + u(x), in mm of both images, by central differences."""
    dim = len(u)
    x = np.indices(u.shape[1:]).astype(np.float64)
    at = np.moveaxis(np.tensordot(moving[:dim, :dim], x + u, axes=1), 0, -1)
    by_voxel = np.stack([np.stack(np.gradient(at[..., i]), -1) for i in range(dim)], -2)
    f = by_voxel @ np.linalg.inv(fixed[:dim, :dim])
    found: np.ndarray = (np.swapaxes(f, -1, -2) @ f - np.eye(dim)) / 2
    return found


def smooth_velocity(dim: int, size: float, seed: int) -> torch.Tensor:
    noise = np.random.default_rng(seed).standard_normal((dim, *[SIDE] * dim))
    v = np.stack([ndimage.gaussian_filter(n, 5) for n in noise])
    return torch.from_numpy(size * v / np.abs(v).max()).float()[None]


def batch_of(dim: int, labels: np.ndarray, moving: np.ndarray | None = None) -> dict[str, Any]:
    images = {f"{side}_image": torch.rand(1, 1, *[SIDE] * dim) for side in ("fixed", "moving")}
    fixed = np.diag([-1.0, -1.5, 2.0][:dim] + [1.0])  # not as long along all axes
    frames = {"fixed_affine": fixed, "moving_affine": fixed if moving is None else moving @ fixed}
    return {
        **images,
        **{key: torch.from_numpy(frame)[None] for key, frame in frames.items()},
        "fixed_label": torch.from_numpy(labels)[None, None],
    }


def discs(dim: int) -> np.ndarray:
    x = np.indices([SIDE] * dim)
    labels = np.zeros([SIDE] * dim, np.int64)
    for label, middle in ((3, 15), (2**40, 33)):
        labels[((x - middle) ** 2).sum(0) < 36] = label
    return labels


@pytest.mark.parametrize("dim", [2, 3])
def test_each_label_has_a_rigid_motion_of_its_own_and_nothing_folds(dim: int) -> None:
    linear = np.eye(dim + 1)  # an affine stage that stretches: what is rigid is the whole
    linear[:dim, :dim] = Rotation.from_euler("z", 5, degrees=True).as_matrix()[:dim, :dim] @ np.diag(
        [1.1, 0.95, 1][:dim]
    )
    labels = discs(dim)
    batch = batch_of(dim, labels, linear)
    before = register(batch["fixed_image"], batch["moving_image"], smooth_velocity(dim, 5, 0)).tensors()
    after, motions = held(before, batch, ["all"])
    u, inverse = after["displacement"], after["inverse"]
    frames = [batch[f"{side}_affine"][0].numpy() for side in ("fixed", "moving")]
    apart = [np.abs(strain(x[0].double().numpy(), *frames)) for x in (before["displacement"], u)]
    assert apart[0][labels != 0].max() > 0.1 and apart[1][labels != 0].max() < 1e-5
    assert not folded_cells(u[0]).any() and set(motions) == {3, 2**40}
    assert max(motion.off for motion in motions.values()) < 1e-4
    assert np.abs(motions[3].matrix - motions[2**40].matrix).max() > 0.5
    far = ndimage.distance_transform_edt(labels == 0) > 50
    assert torch.equal(u[0][:, far], before["displacement"][0][:, far])
    inner = (slice(None), slice(None), *[slice(8, -8)] * dim)
    assert compose(u, inverse)[inner].abs().max() < 0.03  # voxels: u is what is interpolated, at phi^-1 of voxels


def test_what_was_rigid_already_stays() -> None:
    labels = discs(2)
    batch = batch_of(2, labels)
    shift = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, SIDE, SIDE)
    fields = {"displacement": shift, "inverse": -shift}
    after, motions = held(fields, batch, [3])
    torch.testing.assert_close(after["displacement"], shift, atol=1e-5, rtol=0)
    assert motions[3].angle < 1e-3 and motions[3].off < 1e-4


def test_the_motion_is_the_least_squares_one_of_the_label() -> None:
    labels = discs(2)
    batch = batch_of(2, labels)
    u = integrate(smooth_velocity(2, 4, 1))
    _, motions = held({"displacement": u, "inverse": integrate(-smooth_velocity(2, 4, 1))}, batch, [3])
    x = np.argwhere(labels == 3)
    size = np.array([-1.0, -1.5])
    p, q = x * size, (x + u[0][:, labels == 3].numpy().T) * size
    turn, _ = Rotation.align_vectors(
        np.c_[q - q.mean(0), np.zeros(len(q))], np.c_[p - p.mean(0), np.zeros(len(p))]
    )  # scipy's Kabsch
    assert motions[3].angle == pytest.approx(np.degrees(turn.magnitude()), abs=1e-3)


def test_what_cannot_be_rigid_is_said_in_a_line() -> None:
    fields = {"displacement": torch.zeros(1, 2, SIDE, SIDE), "inverse": torch.zeros(1, 2, SIDE, SIDE)}
    with pytest.raises(InputError, match="--rigid: the fixed image has no label 4, 9"):
        held(fields, batch_of(2, discs(2)), [3, 4, 9])
    with pytest.raises(InputError, match="--rigid bones: give all, or labels of the fixed image"):
        labels_of("bones")
    thin = np.zeros((SIDE, SIDE), np.int64)
    thin[10, 10] = 1
    with pytest.raises(InputError, match="--rigid 1: "):
        held(fields, batch_of(2, thin), [1])

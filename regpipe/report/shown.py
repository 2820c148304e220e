"""The images, labels and landmarks of a registered case for its view, on the fixed image's own grid."""

from __future__ import annotations

import numpy as np
from nibabel.affines import apply_affine

from regpipe.fields.algebra import sample_at
from regpipe.io.images import Image, normalise, resample
from regpipe.metrics.measured import Measured
from regpipe.metrics.measures import in_both
from regpipe.report.views import IMAGES, Landmarks


def shown_images(fixed: Image, moving: Image, warped: np.ndarray, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The three images in [0, 1], the last two on the moving image's scale; ``matrix``: fixed point -> moving point.

    Like the warped one, the image before registration is 0 where the moving image does not reach.
    """
    place, shape = matrix @ fixed.affine, fixed.array.shape
    inside = resample(moving._replace(array=np.ones(moving.array.shape, np.uint8)), place, shape, order=0)
    before = resample(moving, place, shape, order=1) * inside
    scaled = (normalise(image, like=moving.array) for image in (before, warped))
    return dict(zip(IMAGES, (normalise(fixed.array), *scaled), strict=True))


def shown_labels(fixed: Image, moving: Image, warped: np.ndarray, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The three label maps on the grid of the fixed one."""
    before = resample(moving, matrix @ fixed.affine, fixed.array.shape, order=0)
    return dict(zip(IMAGES, (fixed.array, before, warped), strict=True))


def shown_landmarks(pair: Measured, frame: np.ndarray) -> Landmarks:
    """The landmarks that both images have; ``frame``: working voxel -> RAS mm of the fixed image."""
    p, q = in_both(*(points.cpu() for points in pair.points))
    back = q + sample_at(pair.inverse[None].cpu(), q[None])[0] if len(q) else q
    at_p, at_q, at_back = (apply_affine(frame, points.double().numpy()) for points in (p, q, back))
    return Landmarks(at_p, at_q, at_back, np.stack([pair.before.errors, pair.errors], axis=-1))

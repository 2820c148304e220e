"""Image pairs with known answers: built-in cohorts for a first run, for supervision and for tests.

    fixed(x) = anatomy(x);  moving(y) = anatomy(phi^-1(y));  u(x) = phi(x) - x
    hence  moving(x + u(x)) = fixed(x)

Nothing is interpolated: anatomy and phi, both ways, are closed forms evaluated at every voxel.
What the scanner adds (speckle, noise, attenuation, shading, the sector) is drawn for each image by
itself and does not follow the deformation.

Arrays are indexed [x, y(, z)]; y is depth in an ultrasound image. Inside this file points q, of
shape (D, *S), are in units of the image: -1 is the first voxel of an axis, +1 the last, so that a
scene is the same on any grid. Displacements follow the convention of ``fields.algebra``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter
from scipy.special import expit

from regpipe.phantoms.motion import (
    LARGEST_MOTION,
    MAGNITUDE,
    Array,
    Deformation,
    Generator,
    Waves,
    column,
    louder,
    random_deformation,
    random_motion,
    unit_grid,
    waves,
)
from regpipe.utils.errors import InputError

SMALLEST_SIDE = 16


class Phantom(NamedTuple):
    """A pair and its answers, in voxels; the convention is that of ``fields.algebra``."""

    fixed_image: Array  # (*S) float32 in [0, 1]
    moving_image: Array
    fixed_label: NDArray[np.uint8]  # (*S)
    moving_label: NDArray[np.uint8]
    displacement: Array  # (D, *S) float32: warps moving onto fixed
    inverse: Array  # (D, *S) float32: warps fixed onto moving
    fixed_landmarks: Array  # (K, D) float32
    moving_landmarks: Array


class Body(NamedTuple):
    """A rippled ellipsoid; ``reach(q) < 1`` is its inside."""

    label: int
    value: float  # ultrasound: echo in dB; MR: signal in [0, 1]
    centre: Array  # (D,)
    to_ball: Array  # (D, D), maps the ellipsoid about its centre onto the unit ball
    ripple: Waves
    rim: float = 0.0  # extra value on the surface: a bright capsule

    def reach(self, q: Array) -> Array:
        """Distance from the centre in radii (*S) of points (D, *S)."""
        ball = np.tensordot(self.to_ball, q - column(self.centre, q), 1)
        return np.sqrt((ball**2).sum(0)) + self.ripple(q)


class Anatomy(NamedTuple):
    """Bodies on a background, later ones over earlier ones."""

    bodies: tuple[Body, ...]
    background: float
    texture: Waves  # added to the value everywhere: tissue is not uniform


Place = Callable[[Array], Array]  # tissue points (D, *S) -> where the scanned image shows them


def make_pair(
    kind: str,
    shape: Sequence[int],
    *,
    seed: int | Sequence[int],
    magnitude: float = MAGNITUDE,
    motion: float | None = None,
) -> Phantom:
    """A random pair of images with its exact displacement; the same arguments give the same bytes.

    Args:
        kind: a key of ``KINDS``.
        shape: 2 or 3 sides in voxels, each at least 16.
        seed: for ``np.random.default_rng``: a non-negative integer or several.
        magnitude: about the mean displacement, as a fraction of the image's side; 0 is none.
        motion: instead of it, the largest displacement in voxels, of a motion like a breath
            (``random_motion``).

    Raises:
        ValueError: for an unknown kind, an impossible shape, or a magnitude or motion out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown phantom kind {kind!r}; there are: {', '.join(KINDS)}")
    shape = checked_shape(shape, magnitude, motion)
    rng = np.random.default_rng(seed)
    draw, scan = KINDS[kind]
    anatomy = draw(rng, len(shape))
    if motion is None:
        phi = random_deformation(rng, len(shape), magnitude=magnitude)
    else:
        phi = random_motion(rng, shape, motion=motion)
    grid = unit_grid(shape)
    tissue = phi.backward(grid)  # what lies under each voxel of the moving image
    half = (np.array(shape) - 1) / 2  # voxels per unit
    fixed_points, moving_points = _landmarks(anatomy, phi)
    return Phantom(
        fixed_image=scan(rng, anatomy, grid, lambda q: q).astype(np.float32),
        moving_image=scan(rng, anatomy, tissue, phi.forward).astype(np.float32),
        fixed_label=paint(anatomy, grid)[0],
        moving_label=paint(anatomy, tissue)[0],
        displacement=((phi.forward(grid) - grid) * column(half, grid)).astype(np.float32),
        inverse=((tissue - grid) * column(half, grid)).astype(np.float32),
        fixed_landmarks=((fixed_points.T + 1) * half).astype(np.float32),
        moving_landmarks=((moving_points.T + 1) * half).astype(np.float32),
    )


def paint(anatomy: Anatomy, tissue: Array) -> tuple[NDArray[np.uint8], Array]:
    """Labels and noise-free values (*S) at tissue points (D, *S)."""
    label = np.zeros(tissue.shape[1:], np.uint8)
    value = np.full(tissue.shape[1:], anatomy.background)
    for body in anatomy.bodies:
        reach = body.reach(tissue)
        label[reach < 1] = body.label
        value[reach < 1] = body.value
        if body.rim:
            value += body.rim * np.exp(-(((reach - 1) / 0.08) ** 2))
    return label, value + anatomy.texture(tissue)


def _landmarks(anatomy: Anatomy, phi: Deformation) -> tuple[Array, Array]:
    """Centre and both x-ends of every labelled body, (D, K), and where they go: those that both images show."""
    points = []
    for body in anatomy.bodies:
        if body.label:
            arm = np.linalg.inv(body.to_ball)[:, 0]
            points += [body.centre, body.centre - arm, body.centre + arm]
    fixed = np.stack(points, axis=1)
    moving = phi.forward(fixed)
    seen = (np.abs(fixed) <= 1).all(0) & (np.abs(moving) <= 1).all(0)
    return fixed[:, seen], moving[:, seen]


# ---- ultrasound: a liver, a kidney with its sinus, a gall bladder with a stone

APEX = 1.7  # the transducer's centre of curvature lies this far above the image centre, in units
SECTOR = (0.72, 2.62, 0.66)  # first and last depth from there, half opening angle in radians
DYNAMIC_RANGE = 55.0  # dB shown between black and white
ATTENUATION = 7.0  # dB per unit of depth, left over after gain compensation


ABDOMEN = (  # label, echo in dB, x, y, x radius, y radius, ripple, rim
    (1, -9, -0.22, -0.02, 0.5, 0.62, 0.05, 7),
    (2, -16, 0.47, 0.28, 0.3, 0.42, 0.03, 8),
    (4, -45, -0.2, 0.02, 0.2, 0.3, 0.03, 6),
)


def _abdomen(rng: Generator, dim: int) -> Anatomy:
    bodies = [_body(rng, dim, row) for row in ABDOMEN]
    _, kidney, bladder = bodies
    ripple = waves(rng, dim, frequency=9, rms=0.06)
    sinus = Body(3, 2, kidney.centre, kidney.to_ball / 0.52, ripple)
    lowest = bladder.centre + 0.6 * np.linalg.inv(bladder.to_ball)[:, 1]
    stone = Body(4, 10, lowest, np.eye(dim) / 0.07, louder(ripple, 0))
    texture = waves(rng, dim, frequency=7, rms=2.0, count=6)
    return Anatomy((*bodies, sinus, stone), -3.0, texture)


def _scan_ultrasound(rng: Generator, anatomy: Anatomy, tissue: Array, place: Place) -> Array:
    """B-mode (*S) in [0, 1]: Rayleigh speckle, log-compressed, in a convex probe's sector."""
    _, echo = paint(anatomy, tissue)
    depth, angle = _beam(unit_grid(tissue.shape[1:]))
    echo = echo - ATTENUATION * (depth - SECTOR[0]) - 22 * _shadow(anatomy, place, tissue.shape[1:])
    scatter = rng.normal(size=(2, *echo.shape)) * 10 ** (echo / 20)
    psf = [0, *[1.0 if axis != 1 else 0.6 for axis in range(echo.ndim)]]  # sharper along the beam
    blurred = gaussian_filter(scatter, psf, mode="nearest")
    # a Gaussian of width s leaves 1 / (2 sqrt(pi) s) of the power of white noise
    loss = np.prod([2 * np.sqrt(np.pi) * s for s in psf[1:]])
    envelope = np.sqrt((blurred**2).sum(0) * loss)
    image = np.clip(0.72 + 20 * np.log10(envelope + 1e-6) / DYNAMIC_RANGE, 0, 1)
    seen = (depth > SECTOR[0]) & (depth < SECTOR[1]) & (angle < SECTOR[2])
    return np.where(seen, image, 0)


def _beam(q: Array) -> tuple[Array, Array]:
    """Depth from the apex and angle off the central beam (*S) at points (D, *S) of the image."""
    lateral = np.sqrt((np.delete(q, 1, axis=0) ** 2).sum(0))
    return np.hypot(lateral, q[1] + APEX), np.arctan2(lateral, q[1] + APEX)


def _shadow(anatomy: Anatomy, place: Place, shape: Sequence[int]) -> Array:
    """1 behind the stone (the last body), 0 elsewhere (*S): cast along the beam, not deformed."""
    apex = np.zeros(len(shape))
    apex[1] = -APEX
    stone = place(anatomy.bodies[-1].centre[:, None])[:, 0] - apex
    distance = np.linalg.norm(stone)
    ray = unit_grid(shape) - apex.reshape(-1, *[1] * len(shape))
    depth = np.sqrt((ray**2).sum(0))
    cosine = np.tensordot(stone / distance, ray, 1) / depth
    aside = np.arccos(np.clip(cosine, -1, 1)) * distance  # across the beam, at the stone's depth
    return expit((0.065 - aside) / 0.012) * expit((depth - distance - 0.07) / 0.02)


# ---- MR: a head, T1-like

HEAD = (  # label, signal, x, y, x radius, y radius, ripple, rim
    (0, 0.75, 0, 0, 0.72, 0.82, 0.02, 0),
    (3, 0.2, -0.15, -0.14, 0.1, 0.26, 0.03, 0),
    (3, 0.2, 0.15, -0.14, 0.1, 0.26, 0.03, 0),
    (4, 0.55, -0.25, 0.23, 0.15, 0.19, 0.03, 0),
    (5, 0.55, 0.25, 0.23, 0.15, 0.19, 0.03, 0),
)
SHELLS = (  # label, signal, size in heads, share of the gyri: skull, fluid, cortex, white matter
    (0, 0.08, 0.93, 0.0),
    (0, 0.2, 0.87, 0.0),
    (1, 0.5, 0.83, 0.3),
    (2, 0.8, 0.64, 1.0),
)


def _head(rng: Generator, dim: int) -> Anatomy:
    head, *deep = [_body(rng, dim, row) for row in HEAD]
    gyri = waves(rng, dim, frequency=18, rms=0.07, count=8)
    shells = [
        Body(label, signal, head.centre, head.to_ball / size, louder(gyri, share))
        for label, signal, size, share in SHELLS
    ]
    texture = waves(rng, dim, frequency=8, rms=0.015)
    return Anatomy((head, *shells, *deep), 0.02, texture)


def _scan_mr(rng: Generator, anatomy: Anatomy, tissue: Array, place: Place) -> Array:
    """Magnitude image (*S) in [0, 1]: coil shading, Rician noise, an intensity scale of its own."""
    _, signal = paint(anatomy, tissue)
    grid = unit_grid(signal.shape)
    shading = np.exp(waves(rng, len(grid), frequency=2, rms=0.12)(grid))
    signal = gaussian_filter(np.clip(signal, 0, 1), 0.5) ** rng.uniform(0.85, 1.2) * shading
    noise = rng.normal(0, 0.025, (2, *signal.shape))
    magnitude = np.hypot(signal + noise[0], noise[1])
    return np.clip(magnitude * rng.uniform(0.7, 1.0), 0, 1)


KINDS = {"ultrasound": (_abdomen, _scan_ultrasound), "mr": (_head, _scan_mr)}  # what there is to image, and how


# ---- random parts


def _body(rng: Generator, dim: int, row: Sequence[float]) -> Body:
    """A body from a row of a table, jittered and turned; its z radius is the mean of the others."""
    label, value, x, y, x_radius, y_radius, ripple, rim = row
    centre = np.array([x, y, 0.0][:dim]) + rng.normal(0, 0.025, dim)
    radii = np.array([x_radius, y_radius, (x_radius + y_radius) / 2][:dim])
    turn = rng.normal(0, 0.1, (dim, dim))
    to_ball = np.diag(1 / (radii * rng.uniform(0.9, 1.1, dim))) @ expm(turn - turn.T)
    surface = waves(rng, dim, frequency=6, rms=ripple)
    return Body(int(label), value, centre, to_ball, surface, rim)


def checked_shape(shape: Sequence[int], magnitude: float, motion: float | None = None) -> tuple[int, ...]:
    if len(shape) not in (2, 3) or min(shape) < SMALLEST_SIDE:
        raise ValueError(f"shape {tuple(shape)}: give 2 or 3 sides of at least {SMALLEST_SIDE}")
    if not magnitude >= 0:
        raise ValueError(f"phantom magnitude {magnitude}: give a fraction of the side, 0 or more")
    most = LARGEST_MOTION * min(shape)
    if motion is not None and not 0 < motion <= most:
        raise InputError(f"phantom motion of {motion} voxels: give more than 0 and at most {most:g}, or longer sides")
    return tuple(int(n) for n in shape)

"""Random diffeomorphisms in closed form, with exact inverses, which deform the phantoms.

Points q, of shape (D, *S), are in units of the image: -1 is the first voxel of an axis, +1 the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm

Array = NDArray[np.floating]
Generator = np.random.Generator

MAGNITUDE = 0.055  # mean displacement as a fraction of the side
LARGEST_MOTION = 0.45  # largest displacement that random_motion gives, as a fraction of the shortest side


class Waves(NamedTuple):
    """A smooth random function, ``sum_k a_k sin(f_k . q + p_k)``."""

    frequency: Array  # (K, D)
    phase: Array  # (K,)
    amplitude: Array  # (K,)

    def __call__(self, q: Array) -> Array:
        """Values (*S) at points (D, *S)."""
        phase = self.phase.reshape(-1, *[1] * (q.ndim - 1))
        return np.tensordot(self.amplitude, np.sin(np.tensordot(self.frequency, q, 1) + phase), 1)


class Coupling(NamedTuple):
    """``q_i -> q_i exp(s(q_j)) + t(q_j), j != i``: determinant exp(s) (Dinh et al., ICLR 2017)."""

    axis: int
    log_scale: Waves
    shift: Waves

    def forward(self, q: Array) -> Array:
        """Move points (D, *S)."""
        moved = q.copy()
        moved[self.axis] = q[self.axis] * np.exp(self.log_scale(q)) + self.shift(q)
        return moved

    def backward(self, q: Array) -> Array:
        """Undo ``forward``; s and t do not depend on axis i, so they have the same values here."""
        moved = q.copy()
        moved[self.axis] = (q[self.axis] - self.shift(q)) * np.exp(-self.log_scale(q))
        return moved


class Deformation(NamedTuple):
    """phi: the couplings, then ``q -> expm(G) q + o``; the determinant is positive everywhere."""

    couplings: tuple[Coupling, ...]
    generator: Array  # (D, D)
    offset: Array  # (D,)

    def forward(self, q: Array) -> Array:
        """phi at points (D, *S): where a point of the fixed image lies in the moving image."""
        for coupling in self.couplings:
            q = coupling.forward(q)
        return np.tensordot(expm(self.generator), q, 1) + column(self.offset, q)

    def backward(self, q: Array) -> Array:
        """phi^-1 at points (D, *S)."""
        q = np.tensordot(expm(-self.generator), q - column(self.offset, q), 1)
        for coupling in reversed(self.couplings):
            q = coupling.backward(q)
        return q

    def scaled(self, factor: float) -> Deformation:
        """Every parameter times ``factor``; 0 is the identity."""
        couplings = tuple(
            Coupling(c.axis, louder(c.log_scale, factor), louder(c.shift, factor)) for c in self.couplings
        )
        return Deformation(couplings, self.generator * factor, self.offset * factor)


def unit_grid(shape: Sequence[int]) -> Array:
    """Coordinates (D, *shape) of every voxel, float64 in [-1, 1]."""
    return np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))


def random_deformation(rng: Generator, dim: int, *, magnitude: float = MAGNITUDE) -> Deformation:
    """Two rounds of couplings and an affine map, scaled to a mean displacement of ``magnitude`` sides."""
    couplings = []
    for axis in [*range(dim)] * 2:
        log_scale, shift = (waves(rng, dim, frequency=3.5, rms=rms) for rms in (0.08, 0.08))
        log_scale.frequency[:, axis] = shift.frequency[:, axis] = 0
        couplings.append(Coupling(axis, log_scale, shift))
    phi = Deformation(tuple(couplings), rng.normal(0, 0.06, (dim, dim)), rng.normal(0, 0.03, dim))
    coarse = unit_grid([9] * dim)
    for _ in range(2):  # nearly linear in the factor
        mean = np.linalg.norm(phi.forward(coarse) - coarse, axis=0).mean() / 2  # a side is 2 units
        phi = phi.scaled(magnitude / mean if mean else 0.0)
    return phi


def random_motion(rng: Generator, shape: Sequence[int], *, motion: float) -> Deformation:
    """A breath and a random deformation, scaled together until the largest displacement is ``motion`` voxels.

    In or out: along axis 1 the shift grows from none at the first voxel to its most at the last, and bulges in the
    middle of the other axes like a diaphragm; the other axes widen with it.
    """
    dim = len(shape)
    small = random_deformation(rng, dim)
    phi = small._replace(couplings=(*_breath(dim, rng.choice([-1, 1])), *small.couplings))
    half = (np.array(shape) - 1) / 2
    coarse = unit_grid([17] * dim)
    for _ in range(12):  # nearly linear in the factor
        farthest = np.linalg.norm((phi.forward(coarse) - coarse) * column(half, coarse), axis=0).max()
        phi = phi.scaled(motion / farthest)
    return phi


def _breath(dim: int, sign: int) -> Iterator[Coupling]:
    nothing = _cosine(np.zeros(dim), 0.0)
    others = [axis for axis in range(dim) if axis != 1]
    along = np.eye(dim)[1]
    stretch = _cosine(np.zeros(dim), sign * 0.2)
    yield Coupling(1, stretch, stretch)  # q + 1 -> about (q + 1) exp(0.2): the first voxel stays
    for axis in others:
        dome = _cosine(np.eye(dim)[axis] * np.pi / 2, sign * 0.3 / len(others))
        yield Coupling(1, nothing, dome)
    for axis in others:  # 0 at the first voxel of axis 1, most at the last
        yield Coupling(axis, _cosine(along * np.pi / 4, sign * 0.12, phase=-np.pi / 4), nothing)


def _cosine(frequency: Array, amplitude: float, *, phase: float = 0.0) -> Waves:
    return Waves(frequency[None], np.array([phase + np.pi / 2]), np.array([amplitude]))


def waves(rng: Generator, dim: int, *, frequency: float, rms: float, count: int = 4) -> Waves:
    """Waves in random directions of up to ``frequency`` radians per unit."""
    directions = rng.normal(size=(count, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    frequencies = directions * frequency * rng.uniform(0.5, 1, (count, 1))
    return Waves(frequencies, rng.uniform(0, 2 * np.pi, count), np.full(count, rms * (2 / count) ** 0.5))


def louder(waves: Waves, factor: float) -> Waves:
    """The same waves with ``factor`` times the amplitude."""
    return waves._replace(amplitude=waves.amplitude * factor)


def column(vector: Array, q: Array) -> Array:
    """A vector (D,) in the shape that it broadcasts in over points q (D, *S)."""
    return vector.reshape(-1, *[1] * (q.ndim - 1))

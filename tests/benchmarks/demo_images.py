"""The small real pairs of docs/examples/real, made from the full ones: a lung CT pair and a brain ultrasound pair.

    python tests/benchmarks/demo_images.py [--data ../shared/data] [-o docs/examples/real]

The lung pair is real: two scans of one patient. Of the brain ultrasound there is one volume. Its moving image is that
volume, moved by a random diffeomorphism known in closed form and shown with another gain and gamma, so that the true
displacement u is known: ``moving(x + u(x)) = fixed(x)`` but for the grey values. Same data, same bytes.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from regpipe.io.images import Image, read_image
from regpipe.io.labels import read_label
from regpipe.phantoms.motion import Array, Deformation, column, random_deformation, unit_grid
from regpipe.transforms import displacement

ROOT = Path(__file__).parents[2]
LPS = np.array([-1.0, -1.0, 1.0])  # times RAS
AIR = -1024  # HU; the scanner's filling outside its field of view is lower
LUNG_FACTORS, BRAIN_FACTORS = (2, 2, 1), (2, 2, 2)  # voxels of the source in one of the copy, along each axis
MARGIN = 2  # voxels of the source kept around the ultrasound's sector
SEED, LARGEST = 1, 6.0  # of the simulated motion; its largest displacement within the sector, mm
GAIN, GAMMA = 0.9, 0.7  # of the moving ultrasound, values in [0, 1]
POINTS, INSIDE = 30, 5  # landmarks: how many, and how far from the sector's rim, voxels
FIELD_STEP, FIELD_DIGIT = 2, 1 / 256  # the true field is kept at every second voxel, in steps of so many mm


def coarse_grid(image: Image, factors: Sequence[int]) -> tuple[tuple[int, ...], Array]:
    """Shape and affine of the grid whose voxels are ``factors`` of the image's; the corner stays where it is."""
    inner = np.diag([*factors, 1.0])
    inner[:-1, -1] = (np.array(factors) - 1) / 2  # the centre of the first block
    return tuple(n // f for n, f in zip(image.array.shape, factors, strict=True)), image.affine @ inner


def smoothed(image: Image, factors: Sequence[int]) -> Image:
    """Blurred as much as the coarser voxel asks for: a Gaussian, sqrt(f^2 - 1) voxels wide at half its height."""
    sigma = np.sqrt(np.square(factors) - 1.0) / np.sqrt(8 * np.log(2))
    return image._replace(array=ndimage.gaussian_filter(image.array.astype(np.float64), sigma, mode="nearest"))


def shrunk(image: Image, factors: Sequence[int]) -> Image:
    """Blurred, then resampled on the coarser grid."""
    shape, affine = coarse_grid(image, factors)
    array = displacement.resample_through(smoothed(image, factors), np.zeros((3, *shape)), affine, order=1)
    return Image(array, affine)


def write(path: Path, array: np.ndarray, affine: Array, dtype: type[np.integer]) -> None:
    limits = np.iinfo(dtype)
    displacement.write_image(path, np.rint(array).clip(limits.min, limits.max).astype(dtype), affine)


def write_points(path: Path, points: Array) -> None:
    """Write points (K, 3) in LPS mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, points, fmt="%.9g", delimiter=",", header="x,y,z", comments="")


# ------------------------------------------------------------------------------------------- lung CT


def lung(data: Path, out: Path) -> None:
    """Both scans, masks and landmarks: baseline is fixed, follow-up is moving."""
    case = "followup_to_baseline"
    for side, name in (("fixed", "baseline"), ("moving", "followup")):
        scan, mask = read_image(data / f"{name}.nii.gz"), read_label(data / f"{name}_mask.nii.gz")[0]
        small = shrunk(scan._replace(array=scan.array.clip(AIR)), LUNG_FACTORS)
        write(out / f"{side}_images" / f"{case}.nii.gz", small.array, small.affine, np.int16)
        inside = shrunk(mask, LUNG_FACTORS)
        write(out / f"{side}_masks" / f"{case}.nii.gz", inside.array > 0.5, inside.affine, np.uint8)
        write_points(out / f"{side}_landmarks" / f"{case}.csv", lung_landmarks(data / "landmarks.csv", name[0]))


def lung_landmarks(table: Path, scan: str) -> Array:
    """The columns of one scan, ``b`` or ``f`` -> (K, 3) LPS mm."""
    with table.open(newline="") as stream:
        ras = [[float(row[f"{scan}{axis}_ras"]) for axis in "xyz"] for row in csv.DictReader(stream)]
    return np.array(ras) * LPS


# ------------------------------------------------------------------------------------------- brain ultrasound


def brain(data: Path, out: Path) -> None:
    """The volume as fixed image, its moved copy, landmarks and the true field."""
    case = "simulated_shift.nii.gz"
    source = cropped(read_image(data / "brain_case3.nii.gz"))
    fixed = shrunk(source, BRAIN_FACTORS)
    inside = shrunk(source._replace(array=source.array > 0), BRAIN_FACTORS).array > 0.5
    phi = motion(inside, fixed.spacing)
    # Each image is interpolated once, from the same blurred volume.
    back = sampled(phi.backward, fixed)
    moving = displacement.resample_through(smoothed(source, BRAIN_FACTORS), back, fixed.affine, order=1)
    write(out / "fixed_images" / case, fixed.array, fixed.affine, np.uint8)
    write(out / "moving_images" / case, regained(moving), fixed.affine, np.uint8)
    for side, points in zip(("fixed", "moving"), brain_landmarks(phi, inside, fixed.affine), strict=True):
        write_points(out / f"{side}_landmarks" / case.replace(".nii.gz", ".csv"), points)
    write_field(out / "displacements" / case, sampled(phi.forward, fixed), fixed.affine)


def cropped(image: Image) -> Image:
    """What is not 0, and a little around it: where the sector is small in its image, elastix finds too few samples."""
    at = np.argwhere(image.array > 0)
    low, high = (at.min(axis=0) - MARGIN).clip(0), at.max(axis=0) + MARGIN + 1
    shift = np.eye(4)
    shift[:-1, -1] = low
    return Image(image.array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], image.affine @ shift)


def motion(inside: np.ndarray, spacing: Array) -> Deformation:
    """A random deformation that moves what is ``inside`` by ``LARGEST`` mm at most."""
    phi = random_deformation(np.random.default_rng(SEED), 3)
    q = unit_grid(inside.shape)[:, inside]
    for _ in range(8):  # nearly linear in the factor
        steps = (phi.forward(q) - q) * column(half_sides(inside.shape) * spacing, q)
        phi = phi.scaled(LARGEST / np.linalg.norm(steps, axis=0).max())
    return phi


def half_sides(shape: Sequence[int]) -> Array:
    """A unit of ``phantoms.motion`` in voxels."""
    return (np.array(shape) - 1) / 2


def sampled(move: Callable[[Array], Array], image: Image) -> Array:
    """A map of units as the displacement (3, *S) in LPS mm at each voxel of the image."""
    q = unit_grid(image.array.shape)
    u = (move(q) - q) * column(half_sides(image.array.shape), q)
    return displacement.native_displacement(u, image.affine, image.affine, image)


def regained(array: Array) -> Array:
    """Another gain and gamma."""
    return 255 * (GAIN * array / 255) ** GAMMA


def brain_landmarks(phi: Deformation, inside: np.ndarray, affine: Array) -> tuple[Array, Array]:
    """Voxels well inside the sector and where they are in the moving image, exactly: (K, 3) LPS mm each."""
    deep = np.argwhere(ndimage.binary_erosion(inside, iterations=INSIDE))
    voxels = deep[np.random.default_rng(SEED).choice(len(deep), POINTS, replace=False)]
    half = half_sides(inside.shape)
    moved = (phi.forward((voxels / half - 1).T).T + 1) * half
    fixed, moving = (apply_affine(affine, at) * LPS for at in (voxels, moved))
    return fixed, moving


def write_field(path: Path, d: Array, affine: Array) -> None:
    """Write a smooth field more coarsely: on its own grid, which its affine tells."""
    step = FIELD_STEP
    kept = np.rint(d[:, ::step, ::step, ::step] / FIELD_DIGIT) * FIELD_DIGIT
    displacement.write_displacement(path, kept, affine @ np.diag([step, step, step, 1.0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REGPIPE_DATA", "../shared/data")))
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "examples" / "real")
    options = parser.parse_args()
    lung(options.data / "lung_ct", options.out / "lung_ct")
    brain(options.data / "ultrasound_3d", options.out / "brain_ultrasound")


if __name__ == "__main__":
    main()

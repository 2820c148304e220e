"""A registered pair as transform files that other tools read.

A pair is an alignment ``T`` and a displacement each way **in the fixed image's space**, on one grid:

    fixed point -> moving point   ``p_f -> T(p_f + d(p_f))``              pulls the moving image onto the fixed grid
    moving point -> fixed point   ``p_m -> y + e(y)``, ``y = T^-1(p_m)``  pulls the fixed image onto the moving grid

Files are named by what they do to an image: ``moving_to_fixed`` holds the map fixed point -> moving point. ITK and
ANTs keep the two parts as they are; FSL, FreeSurfer and Learn2Reg get one displacement per voxel of the image that
is pulled onto. ``transform.json`` says what the files are, and for which images. Same input, same bytes.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from regpipe.io import geometry
from regpipe.io.geometry import lps_matrix, voxel_size
from regpipe.io.images import PathLike
from regpipe.io.itk_bridge import affine_mat, affine_part, composite_h5, field_part
from regpipe.io.source import Source
from regpipe.transforms.displacement import displacement_bytes, map_points
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_hashed
from regpipe.utils.versions import installed

WAYS = ("moving_to_fixed", "fixed_to_moving")
DOES = (
    "pulls the moving image onto the fixed grid; as a map of points: fixed -> moving, LPS mm",
    "pulls the fixed image onto the moving grid; as a map of points: moving -> fixed, LPS mm",
)
ANTS_AFFINE, ANTS_WARPS = "0GenericAffine.mat", ("1Warp.nii.gz", "1InverseWarp.nii.gz")
FNIRT = 2006  # the NIfTI intent of FSL's displacement fields
RIM = 2  # voxels by which the fields extend beyond the images
FADE = 2  # times a displacement: within this it fades to 0 beyond that, too slowly to fold
LARGEST = 8  # times the working grid's number of voxels


class PairTransform(NamedTuple):
    """A registered pair, see above."""

    matrix: np.ndarray  # T (D+1, D+1) RAS mm, fixed point -> moving point
    forward: np.ndarray  # d (D, *grid) float32 LPS mm
    inverse: np.ndarray  # e (D, *grid) float32 LPS mm
    frame: np.ndarray  # (D+1, D+1), voxel of the fields' grid -> RAS mm of the fixed image


class ImageFile(NamedTuple):
    """An image's file and grid."""

    file: str  # its name, without folders
    shape: tuple[int, ...]
    affine: np.ndarray  # (D+1, D+1), voxel index -> RAS mm
    sha256: str
    stored: np.ndarray | None = None  # the same of the file's own voxels, where its axes are sheared


def image_file(path: PathLike, files: Source) -> ImageFile:
    """What ``transform.json`` says of an image; the hash of a series is that of all its files."""
    return ImageFile(Path(path).name, *files.header(path), files.sha256(path))


def pair_transform(
    u: np.ndarray,
    inverse_u: np.ndarray,
    fixed_frame: np.ndarray,
    moving_frame: np.ndarray,
    fixed: tuple[Sequence[int], np.ndarray],
    moving: tuple[Sequence[int], np.ndarray],
) -> PairTransform:
    """The network's displacements as a pair's transform.

    ``T = moving_frame fixed_frame^-1``; ``d(i) = L F u(i)``, F the linear part of ``fixed_frame``; e likewise.
    The grid is the working grid, extended by whole voxels until it covers both images, the moving one carried back by
    ``T``; the rim's value continues there. If that needs more than ``LARGEST`` times the working grid, only the fixed
    image is covered. Beyond, the displacement fades linearly to 0 at the grid's ends, as ITK displaces nothing outside
    a grid and would show a jump; where it fades, ``e`` is only about the inverse of ``d``.

    Args:
        u: (D, *grid), voxels of the working grid, fixed -> moving.
        inverse_u: the same, moving -> fixed.
        fixed_frame: (D+1, D+1), working voxel -> RAS mm of the fixed image; axes at right angles.
        moving_frame: the same of the moving image.
        fixed: shape and affine of the fixed image.
        moving: the same of the moving image.
    """
    fixed_frame = np.asarray(fixed_frame, np.float64)
    matrix = np.asarray(moving_frame, np.float64) @ np.linalg.inv(fixed_frame)
    shape, affine = moving
    carried = shape, np.linalg.inv(matrix) @ affine
    fades = np.maximum(*(_fades(field, fixed_frame) for field in (u, inverse_u)))
    pads = _pads(u.shape[1:], fixed_frame, fixed, carried)
    if np.prod(np.add(u.shape[1:], pads.sum(axis=0))) > LARGEST * u[0].size:
        pads = _pads(u.shape[1:], fixed_frame, fixed)
    frame = fixed_frame.copy()
    frame[:-1, -1] = apply_affine(fixed_frame, -(pads + fades)[0])
    to_lps = lps_matrix(fixed_frame, places=False)[:-1, :-1]
    forward, inverse = (_grown(field, pads, fades, to_lps) for field in (u, inverse_u))
    return PairTransform(matrix, forward, inverse, frame)


def _fades(u: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Voxels (2, D) in which a displacement u (D, *grid), in voxels, fades beyond each end of each axis."""
    spacing, ends = voxel_size(frame), []
    for end in (0, -1):
        faces = (np.tensordot(frame[:-1, :-1], u.take(end, axis + 1), axes=1) for axis in range(len(u)))
        ends.append([np.linalg.norm(face, axis=0).max() for face in faces])
    wanted = np.ceil(FADE * np.array(ends) / spacing).astype(int)
    return np.minimum(wanted, np.maximum(RIM, np.array(u.shape[1:]) // 4))


def _pads(shape: Sequence[int], frame: np.ndarray, *spaces: tuple[Sequence[int], np.ndarray]) -> np.ndarray:
    """Voxels (2, D) to add before and after each axis of a grid, until it reaches ``RIM`` voxels beyond all spaces."""
    extents = [geometry.extent(of, affine, frame) for of, affine in spaces]
    low = np.min([low for low, _ in extents], axis=0)
    high = np.max([high for _, high in extents], axis=0)
    beyond = np.stack([-low, high - (np.array(shape) - 1)])
    return np.maximum(0, np.ceil(beyond).astype(int) + RIM)


def _grown(field: np.ndarray, pads: np.ndarray, fades: np.ndarray, linear: np.ndarray) -> np.ndarray:
    grown = np.pad(np.asarray(field, np.float64), [(0, 0), *(pads + fades).T], mode="edge")
    for axis, (before, after) in enumerate(fades.T, start=1):
        at = np.arange(grown.shape[axis])
        share = np.minimum(at / max(before, 1) + (before == 0), at[::-1] / max(after, 1) + (after == 0)).clip(max=1)
        grown *= share.reshape(-1, *[1] * (grown.ndim - axis - 1))
    return np.tensordot(linear, grown, axes=1).astype(np.float32)


def moving_points(pair: PairTransform, points: np.ndarray) -> np.ndarray:
    """Fixed points (K, D) LPS mm -> ``T(p + d(p))``, linear between the grid's voxels, 0 beyond: ``T(p)``."""
    return apply_affine(lps_matrix(pair.matrix), map_points(points, pair.forward, pair.frame))


def fixed_points(pair: PairTransform, points: np.ndarray) -> np.ndarray:
    """Moving points (K, D) LPS mm -> ``y + e(y)``, ``y = T^-1 p``; interpolated like ``moving_points``."""
    back = np.linalg.inv(lps_matrix(pair.matrix))
    return map_points(apply_affine(back, points), pair.inverse, pair.frame)


def check_formats(formats: Iterable[str], dim: int) -> None:
    """Raises InputError for a format that is unknown, lacks its package, or does not go with the dimension."""
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"no transform format {name!r}; choose among {', '.join(FORMATS)}")
        if dim not in FORMATS[name].dims:
            raise InputError(f"transform format {name}: is 3-D only, these images are {dim}-D; take itk or ants")
        FORMATS[name].require()


def write_transforms(
    folder: PathLike,
    pair: PairTransform,
    fixed: ImageFile,
    moving: ImageFile,
    *,
    formats: Sequence[str] = ("itk", "ants"),
    stage: str = "",
    homography: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Write a pair's transforms into ``folder``, and last ``transform.json``, which describes them.

    Returns name -> SHA-256.

    Args:
        formats: of ``FORMATS``. ``itk``: a composite .h5 each way. ``ants``: ``0GenericAffine.mat``, ``1Warp.nii.gz``,
            ``1InverseWarp.nii.gz``. ``fsl``: a relative warp each way, as ``applywarp`` takes it. ``freesurfer``:
            a warp .mgz each way, as ``mri_convert -at`` takes it. ``l2r``: what Learn2Reg's evaluation reads:
            (X, Y, Z, 3) float32 voxels on the fixed grid, moving voxel minus fixed voxel.
        stage: how the alignment was found, see ``data.placement``.
        homography: (3, 3) RAS mm where it was ``projective``: the alignment whole. ``pair`` has its affine part as its
            matrix, and the rest in its fields.
        settings: what else to keep in ``transform.json``.

    Raises:
        InputError: see ``check_formats``; nothing is written then.
    """
    check_formats(formats, len(fixed.shape))
    folder = Path(folder)
    about = [_write_way(folder, pair, formats, i, fixed, moving) for i in range(2)]
    content = {
        "format": "regpipe transform 1",
        "fixed": _known(fixed),
        "moving": _known(moving),
        **dict(zip(WAYS, about, strict=True)),
        "alignment": {"matrix": pair.matrix, "stage": stage}
        | ({} if homography is None else {"homography": homography}),
        "settings": dict(settings or {}),
        "versions": {package: installed(package) for package in ("regpipe", "itk", "torch", "monai")},
    }
    text = json.dumps(content, indent=1, default=np.ndarray.tolist)
    hashes = {name: digest for way in about for name, digest in way["sha256"].items()}
    return hashes | {"transform.json": replace_hashed(folder / "transform.json", f"{text}\n".encode())}


def _known(file: ImageFile) -> dict[str, Any]:
    return {name: value for name, value in file._asdict().items() if value is not None}


def _write_way(
    folder: Path, pair: PairTransform, formats: Sequence[str], i: int, fixed: ImageFile, moving: ImageFile
) -> dict[str, Any]:
    """Write the files of ``WAYS[i]``; returns what ``transform.json`` says of them."""
    about: dict[str, Any] = {"does": DOES[i]}
    onto, of = (fixed, moving) if i == 0 else (moving, fixed)
    hashes: dict[str, str] = {}
    for name in (name for name in FORMATS if name in formats):
        made = FORMATS[name].make(pair, WAYS[i], onto, of)
        hashes |= {file: replace_hashed(folder / file, data) for file, data in made.items()}
        if made:
            about |= {name: next(iter(made)) if len(made) == 1 else [*made]} | FORMATS[name].about[i]
    return about | {"sha256": hashes}


def _itk(pair: PairTransform, way: str, _onto: ImageFile, _of: ImageFile) -> bytes:
    if way == WAYS[0]:
        parts = [field_part(pair.forward, pair.frame), affine_part(pair.matrix)]
    else:
        parts = [affine_part(np.linalg.inv(pair.matrix)), field_part(pair.inverse, pair.frame)]
    return composite_h5(*parts)


def _ants(pair: PairTransform, way: str, _onto: ImageFile, _of: ImageFile) -> dict[str, bytes]:
    """In the order of ANTs' -t options: a point meets their transforms in it."""
    i = WAYS.index(way)
    warp = {ANTS_WARPS[i]: displacement_bytes((pair.forward, pair.inverse)[i], pair.frame)}
    affine = {ANTS_AFFINE: affine_mat(pair.matrix)}
    return warp | affine if i == 0 else affine | warp


def _fsl(pair: PairTransform, way: str, onto: ImageFile, of: ImageFile) -> bytes:
    """Relative: FSL's mm of the other image minus FSL's mm of this one, at this one's voxels."""
    to_other = _fsl_mm(of) @ np.linalg.inv(of.affine)
    return _nifti(_vectors(pair, way, onto, to_other, _fsl_mm(onto)), onto.affine, FNIRT)


def _fsl_mm(image: ImageFile) -> np.ndarray:
    """Voxel -> FSL's mm: voxels times their size, x running backwards where the affine is right-handed."""
    spacing = voxel_size(image.affine)
    scaled = np.diag([*spacing, 1.0])
    if np.linalg.det(image.affine) > 0:
        scaled[0, 0], scaled[0, 3] = -spacing[0], (image.shape[0] - 1) * spacing[0]
    return scaled


def _l2r(pair: PairTransform, way: str, onto: ImageFile, of: ImageFile) -> bytes:
    return _nifti(_vectors(pair, way, onto, np.linalg.inv(of.affine), np.eye(4)), onto.affine, 0)


def _freesurfer(pair: PairTransform, way: str, onto: ImageFile, of: ImageFile) -> bytes:
    surfa = _surfa()
    target, source = (surfa.ImageGeometry(side.shape, vox2world=side.affine) for side in (onto, of))
    vectors = _vectors(pair, way, onto, np.eye(4), onto.affine)
    warp = surfa.Warp(vectors, source=source, target=target, format=surfa.Warp.Format.disp_ras)
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "warp.mgh"
        warp.save(str(path))
        return _gzip(path.read_bytes())


def _surfa() -> Any:
    try:
        import surfa
    except ImportError as cause:
        raise InputError("transform format freesurfer: needs surfa; pip install surfa") from cause
    return surfa


def _vectors(pair: PairTransform, way: str, onto: ImageFile, to_other: np.ndarray, to_own: np.ndarray) -> np.ndarray:
    """``to_other q - to_own i`` at each voxel i of the image that is pulled onto -> (*S, D) float32.

    q, RAS mm, is the other image's point for i; ``to_other`` and ``to_own`` are (D+1, D+1).
    """
    at = np.moveaxis(np.indices(onto.shape), 0, -1).reshape(-1, len(onto.shape))
    points = apply_affine(lps_matrix(onto.affine, places=False), at)
    moved = (moving_points if way == WAYS[0] else fixed_points)(pair, points)
    turned = to_other @ lps_matrix(np.eye(len(to_own)), places=False)  # from LPS mm
    vectors = apply_affine(turned, moved) - apply_affine(to_own, at)
    return vectors.astype(np.float32).reshape(*onto.shape, -1)


def _nifti(vectors: np.ndarray, affine: np.ndarray, intent: int) -> bytes:
    image = nib.Nifti1Image(vectors, affine)
    image.header.set_intent(intent)
    image.header.set_xyzt_units("mm")
    return _gzip(image.to_bytes())


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)  # no time stamp: same bytes


Files = Callable[[PairTransform, str, ImageFile, ImageFile], dict[str, bytes]]


class Format(NamedTuple):
    """A format of transform files."""

    make: Files  # (pair, one of WAYS, image that is pulled onto, image that is pulled) -> name -> content; {}: none
    dims: Sequence[int] = (2, 3)
    require: Callable[[], object] = lambda: None  # raises InputError where a package is missing
    about: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # what else transform.json says of each way


def one_file(
    content: Callable[[PairTransform, str, ImageFile, ImageFile], bytes], suffix: str, ways: Sequence[str] = WAYS
) -> Files:
    """Files of a format that is one file each way, called by the way and a suffix."""

    def make(pair: PairTransform, way: str, onto: ImageFile, of: ImageFile) -> dict[str, bytes]:
        return {f"{way}{suffix}": content(pair, way, onto, of)} if way in ways else {}

    return make


FORMATS: dict[str, Format] = {
    "itk": Format(one_file(_itk, ".h5")),
    "ants": Format(_ants, about=({"ants_invert": [False, False]}, {"ants_invert": [True, False]})),
    "fsl": Format(one_file(_fsl, "_fsl.nii.gz"), dims=(3,)),
    "freesurfer": Format(one_file(_freesurfer, "_freesurfer.mgz"), dims=(3,), require=_surfa),
    "l2r": Format(one_file(_l2r, "_l2r.nii.gz", WAYS[:1]), dims=(3,)),  # Learn2Reg knows one way
}

"""Where a NIfTI lies: where ITK puts it, and so ANTs, Slicer and SimpleITK, which get our transform files.

nibabel takes the sform, else the qform, else the centre, and lengths as if they were mm. ITK takes the sform if its
code is 1, if it agrees with the qform, or if there is no qform; else the qform; else the first voxel is at 0. Sizes are
``pixdim``, with its sign, in the unit that the header names (itkNiftiImageIO.cxx, SetImageIOOrientationFromNIfTI).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from regpipe.io.geometry import voxel_corners

PLACED = ["pixdim", "xyzt_units", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z"]
PLACED += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
UNITS = {1: "metres", 3: "microns"}


class _Header1(nib.Nifti1Header):
    quaternion_threshold = np.float64(-1e-3)  # rounding makes them a little longer than 1; ITK takes any


class _Header2(nib.Nifti2Header):
    quaternion_threshold = np.float64(-1e-3)


class _Image1(nib.Nifti1Image):
    header_class = _Header1


class _Image2(nib.Nifti2Image):
    header_class = _Header2


IMAGES = (_Image1, _Image2)  # as nibabel reads them, and as ITK does where a quaternion is a little too long


def placed_image(array: np.ndarray, affine: np.ndarray) -> Any:
    """A ``nib.Nifti1Image`` of an array that lies at ``affine`` (D+1, D+1), voxel index -> RAS mm, for every reader."""
    whole, keep = np.eye(4), [*range(len(affine) - 1), 3]
    whole[np.ix_(keep, keep)] = affine
    image = nib.Nifti1Image(array, whole, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(whole, code="scanner")
    image.set_qform(whole, code="scanner")
    if not np.allclose(image.get_qform(), whole, atol=1e-3):
        image.set_qform(None, code=0)  # sheared: a quaternion cannot say it, so it says nothing
    return image


def itk_place(header: Any, by_nibabel: np.ndarray, dim: int = 3) -> np.ndarray | None:
    """RAS affine (4, 4) of a header as it stands in the file; None where ITK refuses it.

    None: a sheared sform without a qform, or a 2D image that stands upright on the plane of the first two axes.
    """
    if _plain(header) and (dim > 2 or np.allclose(by_nibabel[2, :2], 0, atol=1e-6)):
        return by_nibabel
    import itk  # takes a second; few headers need it

    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / "header.nii"
        file.write_bytes(_alone(header, dim))
        io = itk.NiftiImageIO.New()
        io.SetFileName(str(file))
        try:
            io.ReadImageInformation()
        except RuntimeError:
            return None
    affine = np.eye(4)
    for i in range(dim):
        affine[:dim, i] = np.array(io.GetDirection(i)) * io.GetSpacing(i)
        affine[i, 3] = io.GetOrigin(i)
    affine[:2] *= -1  # LPS -> RAS
    return affine if np.linalg.det(affine) or dim > 2 else None


def told(header: Any, affine: np.ndarray, by_nibabel: np.ndarray, shape: tuple[int, ...]) -> str:
    """What is to be said of a file's place; empty where all programs agree on it."""
    apart = _apart(affine, by_nibabel, shape)
    slack = 0.1 * np.linalg.norm(affine[:3, :3], axis=0).min()
    forms = [name for name in ("sform", "qform") if is_nifti(header) and header[f"{name}_code"] > 0]
    said = []
    if not forms:
        said.append("neither sform nor qform is set")
    elif len(forms) == 2:
        sform, qform = (_form(header, name) for name in forms)
        between = _apart(sform, qform, shape)
        if not between <= slack:
            used = "qform" if _apart(qform, affine, shape) < _apart(sform, affine, shape) else "sform"
            said.append(f"sform and qform are {between:.3g} mm apart at a corner, the {used} is used")
    if not apart <= slack:
        unit = int(header["xyzt_units"]) & 7 if is_nifti(header) else 0
        said += [f"its unit is {UNITS[unit]}"] if unit in UNITS else []
        said.append(f"placed as ITK, ANTs and Slicer place it, up to {apart:.3g} mm from where nibabel does")
    return "; ".join(said)


def is_nifti(header: Any) -> bool:
    """Whether it is one, and not its ancestor Analyze, which has no forms."""
    return isinstance(header, nib.Nifti1Header)


def _plain(header: Any) -> bool:
    """Whether ITK and nibabel cannot differ."""
    size = header["pixdim"][1:4]
    if not is_nifti(header) or int(header["xyzt_units"]) & 7 in UNITS or not (size > 0).all():
        return False
    known = all(header[f"{name}_code"] in range(6) for name in ("sform", "qform"))
    if not known or header["pixdim"][0] not in (-1, 0, 1):  # of which nibabel makes what is
        return False
    if header["sform_code"] <= 0:
        return bool(header["qform_code"] > 0)
    sform = header.get_sform()
    turn = sform[:3, :3] / size
    if not np.allclose(turn.T @ turn, np.eye(3), atol=1e-5):
        return False
    alone = header["qform_code"] <= 0 or header["sform_code"] == 1
    return bool(alone or np.allclose(_form(header, "qform"), sform, atol=1e-5))


def _form(header: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(getattr(header, f"get_{name}")())
    except (ValueError, nib.spatialimages.HeaderDataError):  # a quaternion that is none
        return np.full((4, 4), np.nan)


def _apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance between the places of a corner, mm."""
    corners = np.c_[voxel_corners((*shape, 1, 1)[:3]), np.ones(8)].T
    return float(np.linalg.norm((one - other)[:3] @ corners, axis=0).max())


def _alone(header: Any, dim: int) -> bytes:
    """A NIfTI-1 file of one voxel in the same place: ITK reads no NIfTI-2, and needs no voxels for the place."""
    alone = nib.Nifti1Header()
    for field in PLACED if is_nifti(header) else PLACED[:1]:
        alone[field] = header[field]
    alone["dim"] = [dim, 1, 1, 1, 1, 1, 1, 1]
    alone["magic"], alone["vox_offset"] = b"n+1", 352
    alone.set_data_dtype(np.uint8)
    return bytes(alone.binaryblock) + bytes(8)

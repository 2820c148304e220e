"""Affine files of other tools, recognised by their content and not by their names.

Each is a matrix in a documented frame and takes a few lines to read; the tests compare them with nitransforms. ``.lta``
and ``.xfm`` say where a point of the moving image goes, the others where a point of the fixed image comes from. What
needs more than the file is refused by its name, with the command that converts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.io import formats, itk_bridge
from regpipe.io.geometry import lps_matrix
from regpipe.utils import limits
from regpipe.utils.errors import InputError

LARGEST_TEXT = 256 << 20  # bytes; elastix writes a B-spline's numbers as text
HEAD = 4096
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
SUFFIXES = (".lta", ".xfm", ".x5", ".1d", ".aff12", ".mat", ".txt", ".tfm", ".dat", ".h5", ".hdf5", ".mtx", ".xform")
FLIRT = "c3d_affine_tool -ref FIXED -src MOVING {} -fsl2ras -oitk affine.txt"
ELASTIX = 'let elastix write ITK\'s too, (ITKTransformOutputFileNameExtension "h5")'


class Foreign(NamedTuple):
    """A transform of another tool."""

    points: Any  # itk.Transform, LPS mm, that maps points as the file says
    images: Any  # that pulls the moving image onto the fixed grid


def read(path: Path) -> Foreign | None:
    """The transform of a file that another tool wrote; None of ITK's files and of unknown ones.

    Raises:
        InputError: known, but not read, or not enough by itself: with the command that converts it; broken.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"\x89HDF"):
        return _x5(path)
    if head.startswith(b"MATLAB "):
        raise InputError(f"{path}: a MATLAB 5 or 7 file (SPM's?), not ITK's; convert it to an ITK transform first")
    if head.startswith(formats.GZIP) and not path.name.lower().endswith(".nii.gz"):
        raise InputError(f"{path}: packed by gzip; unpack it, gunzip {path.name}")
    _refuse_by_name(path)
    if b"\0" in head or b"#Insight" in head[:16]:
        return None
    text = head.decode("utf-8-sig", "replace")
    for pattern, reader in READERS.items():
        if re.search(pattern, text, re.MULTILINE):
            limits.require_room(path, [path.stat().st_size])
            if path.stat().st_size > LARGEST_TEXT:
                raise InputError(f"{path}: is longer than {LARGEST_TEXT >> 20} MiB of text; {ELASTIX}")
            try:
                return reader(path, path.read_text("utf-8-sig", "replace"))
            except (ValueError, IndexError, KeyError, np.linalg.LinAlgError) as cause:
                if isinstance(cause, InputError):
                    raise
                raise InputError(
                    f"{path}: cut off or changed ({cause or type(cause).__name__}); write it again"
                ) from cause
    return None


def _refuse_by_name(path: Path) -> None:
    """Raises ``InputError`` of what its suffix tells: its content does not, or it is never enough."""
    told = next((told for suffix, told in NAMED.items() if path.name.lower().endswith(suffix)), "")
    if told:
        raise InputError(f"{path}: {told.format(path.name)}")


def _affine(matrix: np.ndarray, *, of_moving: bool = False) -> Foreign:
    """``matrix`` (4, 4) RAS mm; ``of_moving``: takes points of the moving image."""
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise ValueError("its matrix has no inverse, or is no 4 x 4 numbers")
    if not np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-6):
        raise ValueError("the last row of its matrix is not 0 0 0 1")
    points = itk_bridge.itk_affine(matrix)
    return Foreign(points, itk_bridge.itk_affine(np.linalg.inv(matrix)) if of_moving else points)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


def _x5(path: Path) -> Foreign | None:
    import h5py

    with h5py.File(path) as file:
        group = file.get("TransformGroup/0")
        if group is None or "Type" not in group.attrs:
            return None
        if len(file["TransformGroup"]) > 1 or group.attrs["Type"] not in ("linear", b"linear"):
            raise InputError(f"{path}: an .x5 of more than one matrix; convert it by nitransforms to ITK's .h5")
        if group["Transform"].size != 16:
            raise InputError(f"{path}: an .x5 with a matrix for each of several frames; save one")
        return _affine(np.array(group["Transform"], np.float64).reshape(4, 4))


def _lta(path: Path, text: str) -> Foreign:
    """FreeSurfer: points of ``src`` to points of ``dst``, in RAS mm or in voxels of the volumes that it describes."""
    text = re.sub(r"#.*", "", text)
    said = {key: value for key, value in re.findall(r"^\s*(type|nxforms)\s*=\s*(\d+)", text, re.MULTILINE)}
    if int(said.get("nxforms", 1)) != 1:
        raise InputError(f"{path}: holds {said['nxforms']} transforms; save one")
    matrix = _numbers(re.split(r"^\s*1\s+4\s+4\s*$", text, flags=re.MULTILINE)[1].partition("src volume")[0])
    matrix = matrix.reshape(4, 4)
    if int(said["type"]) == 0:
        source, target = (_volume(path, text, side) for side in ("src", "dst"))
        matrix = target @ matrix @ np.linalg.inv(source)
    elif int(said["type"]) != 1:
        raise InputError(f"{path}: an .lta of type {said['type']}; lta_convert --inlta {path.name} --outlta ras.lta")
    return _affine(matrix, of_moving=True)


def _volume(path: Path, text: str, side: str) -> np.ndarray:
    """Voxel -> RAS mm (4, 4)."""
    block = text.partition(f"{side} volume info")[2]
    held = {}
    for key in ("valid", "volume", "voxelsize", "xras", "yras", "zras", "cras"):
        found = re.search(rf"^\s*{key}\s*=(.*)$", block, re.MULTILINE)
        held[key] = _numbers(found[1]) if found else np.zeros(3)
    if not held["valid"].any():
        raise InputError(f"{path}: an .lta in voxels that does not describe its {side} volume; write it with both")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([held[key] for key in ("xras", "yras", "zras")], 1) * held["voxelsize"]
    affine[:3, 3] = held["cras"] - affine[:3, :3] @ (held["volume"] / 2)
    return affine


def _xfm(path: Path, text: str) -> Foreign:
    """MINC, and FreeSurfer's talairach.xfm: RAS mm, points of the source to points of the target."""
    kinds = re.findall(r"Transform_Type\s*=\s*(\w+)", text)
    if kinds != ["Linear"]:
        raise InputError(f"{path}: a MINC transform of {' and '.join(kinds) or 'no kind'}; one Linear is read")
    body = re.sub(r"%.*", "", text).partition("Linear_Transform")[2].partition("=")[2].partition(";")[0]
    matrix = np.vstack([_numbers(body).reshape(3, 4), [0, 0, 0, 1]])
    matrix = np.linalg.inv(matrix) if re.search(r"Invert_Flag\s*=\s*True", text) else matrix
    return _affine(matrix, of_moving=True)


def _matrix(path: Path, text: str) -> Foreign:
    """Plain numbers: 4 x 4 of FLIRT (refused), NiftyReg or MRtrix, 3 x 4 of AFNI."""
    lines = [re.split(r"[\s,]+", line.strip(" \t,")) for line in re.sub(r"[#/%].*", "", text).splitlines()]
    rows = [[float(n) for n in line] for line in lines if line != [""]]
    sizes = {len(row) for row in rows}
    if sizes == {12}:
        if len(rows) > 1:
            raise InputError(f"{path}: AFNI's, a matrix for each of {len(rows)} frames; save the one that is meant")
        rows = np.reshape(rows, (3, 4)).tolist()
    if sizes == {4} and len(rows) == 4 and path.suffix.lower() in (".mat", ".mtx", ".fsl", ".flirt", ".xform"):
        raise InputError(
            f"{path}: FLIRT's matrix, in FSL's mm of two images that it does not name; {FLIRT.format(path.name)}"
        )
    if sizes not in ({4}, {12}) or len(rows) not in (3, 4):
        told = f"{len(rows)} rows of {' or '.join(map(str, sorted(sizes)))}"
        raise InputError(
            f"{path}: its numbers are {told}, no matrix of 3 or 4 rows and 4 columns; write it as ITK's .tfm"
        )
    if len(rows) == 3:  # DICOM's mm, which are LPS
        return _affine(lps_matrix(np.vstack([rows, [0, 0, 0, 1]])))
    formats.warn_once(
        f"{path}: taken as NiftyReg and MRtrix write it, RAS mm, from fixed to moving; were it FLIRT's: "
        + FLIRT.format(path.name)
    )
    return _affine(np.array(rows))


def _elastix(path: Path, text: str) -> Foreign:
    """elastix: LPS mm, points of the fixed image to points of the moving one, after the initial transform's."""
    parts: list[Any] = []
    seen: set[Path] = set()
    while True:
        said = {
            k: v.replace('"', " ").split() for k, v in re.findall(r"^\s*\((\w+)\s+(.*?)\)\s*(?://.*)?$", text, re.M)
        }
        _require_known(path, said)
        parts.append(_elastix_part(path, said))
        named = said.get("InitialTransformParameterFileName") or said.get("InitialTransformParametersFileName")
        seen.add(path)
        if not named or named == ["NoInitialTransform"]:
            break
        before = path.with_name(Path(" ".join(named).replace("\\", "/")).name)
        if not before.is_file() or before in seen:
            raise InputError(f"{path}: begins with {before.name}, which is not beside it; put it there")
        path, text = before, before.read_text("utf-8", "replace")
    points = parts[0] if len(parts) == 1 else itk_bridge.composite(*reversed(parts))
    return Foreign(points, points)


def _require_known(path: Path, said: Mapping[str, list[str]]) -> None:
    if said.get("HowToCombineTransforms", ["Compose"]) != ["Compose"]:
        raise InputError(f"{path}: adds its transforms to each other; {ELASTIX}")
    if said.get("UseDirectionCosines", ["true"]) != ["true"]:
        raise InputError(f"{path}: leaves out the images' directions (UseDirectionCosines); {ELASTIX}")


def _elastix_part(path: Path, said: Mapping[str, list[str]]) -> Any:
    import itk

    kind, values = said["Transform"][0].removesuffix("Stack"), _numbers(" ".join(said.get("TransformParameters", [])))
    dim = int(said["FixedImageDimension"][0])
    order = said.get("BSplineTransformSplineOrder", ["3"])[0]
    makers = {
        "TranslationTransform": ("TranslationTransform", f"D{dim}"),
        "EulerTransform": (f"Euler{dim}DTransform", "D"),
        "SimilarityTransform": (f"Similarity{dim}DTransform", "D"),
        "AffineTransform": ("AffineTransform", f"D{dim}"),
        "BSplineTransform": ("BSplineTransform", f"D{dim}{order}"),
    }
    if kind not in makers or kind != said["Transform"][0]:
        raise InputError(f"{path}: elastix's {said['Transform'][0]}; read are {', '.join(makers)}; {ELASTIX}")
    try:
        transform = itk_bridge.wrapped(*makers[kind]).New()
    except (AttributeError, ModuleNotFoundError) as cause:
        raise InputError(f"{path}: elastix's {kind} in {dim}-D, of this order; {ELASTIX}") from cause
    if kind == "BSplineTransform":
        grid = [_numbers(" ".join(said[f"Grid{key}"])) for key in ("Size", "Origin", "Spacing", "Direction")]
        if np.prod(grid[0]) * dim != len(values):
            raise ValueError(f"its grid of {grid[0]} and its {len(values)} numbers do not fit")
        grid[3] = grid[3].reshape(dim, dim).T.ravel()  # elastix writes columns
        transform.SetFixedParameters(itk.OptimizerParameters[itk.D](np.concatenate(grid).tolist()))
    elif "CenterOfRotationPoint" in said:
        transform.SetCenter([float(n) for n in said["CenterOfRotationPoint"]])
    if kind == "EulerTransform" and dim == 3:
        transform.SetComputeZYX(said.get("ComputeZYX") == ["true"])
    if len(values) != transform.GetNumberOfParameters():
        raise ValueError(f"holds {len(values)} of {transform.GetNumberOfParameters()} numbers")
    transform.SetParameters(itk.OptimizerParameters[itk.D](values.tolist()))
    return transform


def _register_dat(path: Path, _text: str) -> Foreign:
    raise InputError(
        f"{path}: FreeSurfer's register.dat needs its images; "
        f"tkregister2 --reg {path.name} --mov MOVING --targ FIXED --noedit --ltaout affine.lta"
    )


def _elastix_toml(path: Path, _text: str) -> Foreign:
    raise InputError(f"{path}: elastix's parameters as TOML; give those as .txt, or {ELASTIX}")


NAMED = {
    ".m3z": "FreeSurfer's warp; mri_warp_convert --inm3z {} --outitk warp.nii.gz",
    ".mgz": "FreeSurfer's; a warp is converted by mri_warp_convert --inmgzwarp {} --outitk warp.nii.gz",
    ".trm": "BrainVISA's, in mm of two images that it does not name; write the matrix as ITK's .tfm",
}
READERS: dict[str, Callable[[Path, str], Foreign]] = {
    r'^\s*\(Transform\s+"': _elastix,
    r"^\s*nxforms\s*=": _lta,
    r"^\s*MNI Transform File": _xfm,
    r'^\s*Transform\s*=\s*\[?\s*"': _elastix_toml,
    # a subject, two voxel sizes and an intensity before the matrix; the last word is missing in old ones
    rf"\A\s*\S+\s*\n(?:\s*{NUMBER}\s*\n){{3}}\s*(?:{NUMBER}[ \t]+){{3}}{NUMBER}": _register_dat,
    # the first line that is no comment begins with four numbers
    rf"\A(?:\s*(?:[#/%].*)?\n)*\s*(?:{NUMBER}[\s,]+){{3}}{NUMBER}": _matrix,
}

"""Makes a 2D cohort of a 3D one: of each subject the slice that shows its structures best."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from regpipe.data.pairs import list_pairs
from regpipe.engines import record
from regpipe.io import images
from regpipe.io.geometry import upright, voxel_size
from regpipe.io.images import PathLike
from regpipe.io.labels import read_label
from regpipe.transforms import displacement
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

AXES = "sagittal", "coronal", "axial"  # across the RAS axes
RECORD = "slices.json"


def write_slices(src: PathLike, dst: PathLike, *, axis: int | None = None) -> Path:
    """Write one slice of each 3D subject as a 2D data set: ``images/`` and ``labels/``, names and groups kept.

    The slice has the most label voxels of those that show every label of its subject; in mm it keeps the pixel
    size of its plane. Same names, so the same split as ``src``. A folder that holds these slices already is
    returned at once.

    Args:
        src: a folder of 3D subjects with labels.
        dst: the folder to write, made where needed.
        axis: across which the slices lie: 0 sagittal, 1 coronal, 2 axial (closest RAS axes). None: the one whose
            poorest subject shows the most label voxels.

    Raises:
        InputError: not 3D, a subject without labels or without such a slice; ``dst`` holds something else.
    """
    src, dst = Path(src).expanduser(), Path(dst)
    cases = list_pairs(src, pairing="first")
    about = json.dumps({"axis": axis, "data": record.digest(cases)}) + "\n"
    if _holds(dst, about):
        return dst
    subjects = {case[f"{side}_image"]: case.get(f"{side}_label") for case in cases for side in ("fixed", "moving")}
    if len({images.stem(image) for image in subjects}) < len(subjects):
        raise InputError(
            f"{src}: several images of one name; slices are made of subjects, a folder images/ with labels/"
        )
    areas = {
        image: _areas(image, label)
        for image, label in Progress(subjects.items(), what="reading labels", unit="subjects")
    }
    if axis is None:
        axis = int(np.argmax(np.array([[n.max() for n in subject] for subject in areas.values()]).min(axis=0)))
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as aside:
        part = Path(aside) / "slices"
        for image, label in Progress(subjects.items(), what="writing slices", unit="subjects"):
            if not areas[image][axis].any():
                raise InputError(f"{image}: no {AXES[axis]} slice shows all its labels; take another axis")
            _write_slice(part, image, str(label), axis, int(areas[image][axis].argmax()))
        if (src / "groups.csv").is_file():
            shutil.copy(src / "groups.csv", part)
        replace_file(part / RECORD, about.encode())
        part.rename(dst)
    return dst


def _holds(dst: Path, about: str) -> bool:
    if not dst.exists():
        return False
    if (dst / RECORD).is_file() and (dst / RECORD).read_text() == about:
        return True
    raise InputError(f"{dst}: holds something else than the slices of these data; name another folder")


def _areas(image: str, label: str | None) -> list[np.ndarray]:
    """For each axis: label voxels in each slice across it, 0 where a label of the subject is missing."""
    if label is None:
        raise InputError(f"{image}: has no label, by which the slice is chosen; add the label file")
    array, _ = upright(*read_label(label)[0][:2])
    if array.ndim != 3:
        raise InputError(f"{label}: is {array.ndim}D; slices are made of 3D images")
    counts = []
    for axis in range(3):
        across = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        held = [(across == value).sum(1) for value in np.unique(array[array > 0])]
        counts.append(sum(held, np.zeros(len(across), int)) * np.all(held, axis=0))
    return counts


def _write_slice(out: Path, image: str, label: str, axis: int, index: int) -> None:
    kinds = {"images": images.read_image(image), "labels": read_label(label)[0]}
    if kinds["images"].array.shape != kinds["labels"].array.shape:
        raise InputError(f"{label}: is not on the grid of {image}; resample it first")
    for folder, whole in kinds.items():
        array, affine = upright(whole.array, whole.affine)
        plane = np.diag([*np.delete(voxel_size(affine), axis), 1.0])
        path = out / folder / f"{images.stem(image)}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        displacement.write_image(path, array.take(index, axis), plane)

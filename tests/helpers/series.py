"""DICOM files as scanners write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

LPS = np.diag([-1.0, -1.0, 1.0])


def write_dicom(path: Path, pixels: np.ndarray, series: str = "a", sop: UID = CTImageStorage, **tags: Any) -> Path:
    """One file; ``pixels`` ([frames,] rows, columns[, 3])."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = sop
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    data.SeriesDescription = f"series {series}"
    colour = "PlanarConfiguration" in tags
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, array: np.ndarray, affine: np.ndarray, series: str = "a", **tags: Any) -> list[Path]:
    """A file per slice of ``array`` (X, Y, Z) with the RAS ``affine``, under names that say nothing of their order."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = LPS @ affine[:3, :3] / spacing
    names = [f"{n:04X}" for n in np.random.default_rng(3).permutation(array.shape[2]) * 37]
    written = []
    for k, name in enumerate(names):
        place = LPS @ apply_affine(affine, [0, 0, k])
        where: dict[str, Any] = {
            "ImagePositionPatient": [f"{v:.10g}" for v in place],
            "ImageOrientationPatient": [f"{v:.10g}" for v in (*axes[:, 0], *axes[:, 1])],
            "PixelSpacing": [f"{spacing[1]:.10g}", f"{spacing[0]:.10g}"],
        }
        pixels = np.ascontiguousarray(array[:, :, k].T)
        written.append(write_dicom(folder / f"{series}{name}", pixels, series, **(where | tags)))
    return written

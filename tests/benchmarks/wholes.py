"""Whole, small files of each format that regpipe reads, as bytes: what ``fuzz`` damages."""

from __future__ import annotations

import io

import h5py
import nibabel as nib
import numpy as np
import pydicom
import torch
from PIL import Image as Picture
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID


def saved(state: object, *, new: bool) -> bytes:
    data = io.BytesIO()
    torch.save(state, data, _use_new_zipfile_serialization=new)
    return data.getvalue()


def nifti(shape: tuple[int, ...], kind: str) -> bytes:
    array = (np.arange(np.prod(shape)) % 7).astype(kind).reshape(shape)
    return nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]), dtype=array.dtype).to_bytes()


def picture(form: str) -> bytes:
    data = io.BytesIO()
    Picture.fromarray((np.arange(90).reshape(9, 10) % 7).astype(np.uint8)).save(data, format=form)
    return data.getvalue()


def nrrd(encoding: str, data: bytes) -> bytes:
    head = f"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 9 5 2\nencoding: {encoding}\n"
    return f"{head}space directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (1,-2,3)\n\n".encode() + data


def dicom(place: float, syntax: UID = uid.ExplicitVRLittleEndian) -> bytes:
    """One slice of 9 x 10 pixels at ``place`` mm along the stack."""
    meta = FileMetaDataset()
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = UID(f"1.2.3.{place:.0f}")
    data.SOPClassUID, data.SeriesInstanceUID = uid.CTImageStorage, UID("1.2.3")
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, place], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.Rows, data.Columns = [1, 2], 9, 10
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.RescaleSlope, data.RescaleIntercept = 2, -1
    data.PixelData = encapsulate([picture("jpeg")]) if syntax == uid.JPEGBaseline8Bit else bytes(range(90))
    data["PixelData"].VR = "OB"
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


PLACE = np.diag([1.0, 2.0, 3.0, 1.0])
FIELD = "DisplacementFieldTransform_double_2_2", np.r_[3, 2, 5, -2, 1, 2, 1, 0, 0, 1], np.arange(12) / 8
SPLINE = "BSplineTransform_double_2_2", np.r_[4, 4, -3, -3, 3, 3, 1, 0, 0, 1], np.arange(32) / 8
EULER = "Euler3DTransform_double_3_3", np.r_[1, 2, 3, 0], np.r_[0.1, 0.2, 0.3, 4, 5, 6]
WHOLE = "CompositeTransform_double_2_2", np.empty(0), np.empty(0)


def text_transforms(*parts: tuple[str, np.ndarray, np.ndarray]) -> bytes:
    """ITK's .tfm."""
    lines = ["#Insight Transform File V1.0"]
    for i, (kind, *numbers) in enumerate(parts):
        lines += [f"#Transform {i}", f"Transform: {kind}"]
        values = (" ".join(f"{n:.17g}" for n in some) for some in numbers)
        if kind != WHOLE[0]:
            lines += [f"{name}: {text}" for text, name in zip(values, ("FixedParameters", "Parameters"), strict=True)]
    return "\n".join([*lines, ""]).encode()


def hdf5_transforms(*parts: tuple[str, np.ndarray, np.ndarray]) -> bytes:
    """ITK's .h5, as its own writer lays it out: nothing packed."""
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        for i, (kind, *numbers) in enumerate(parts):
            group = file.create_group(f"TransformGroup/{i}")
            group.create_dataset("TransformType", data=np.array([kind], object), dtype=h5py.string_dtype("ascii"))
            if kind != WHOLE[0]:
                group.create_dataset("TransformFixedParameters", data=numbers[0].astype(np.float64))
                group.create_dataset("TransformParameters", data=numbers[1].astype(np.float64))
    return data.getvalue()


def mesh_vtk(*, binary: bool) -> bytes:
    places = np.arange(12, dtype=">f4").reshape(4, 3)
    cells = b"\nPOLYGONS 1 4\n" + (np.array([3, 0, 1, 2], ">i4").tobytes() if binary else b"3 0 1 2") + b"\n"
    body = places.tobytes() if binary else " ".join(map(str, places.ravel().tolist())).encode()
    form = b"BINARY" if binary else b"ASCII"
    return b"# vtk DataFile Version 3.0\nmesh SPACE=RAS\n%b\nDATASET POLYDATA\nPOINTS 4 float\n%b%b" % (
        form,
        body,
        cells,
    )

"""Truth: the volume that the frames were cut from; its place by SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from regpipe.io.images import header
from regpipe.io.labels import read_label
from regpipe.io.source import Source
from regpipe.transforms.resample import read_voxels
from regpipe.utils.errors import InputError

TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
ORIGIN, SPACING = np.array([-20.0, -30, 5]), np.array([2.0, 1.5, 3.0])


def item(**values: object) -> Sequence:
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return Sequence([data])


def volume() -> np.ndarray:
    """Three segments (X, Y, Z), the first slice empty, none in slice 4."""
    labels = np.zeros((16, 12, 8), int)
    labels[2:6, 2:7, 1:3] = 1
    labels[8:12, 3:9, 2:4] = 2
    labels[5:9, 5:9, 5:8] = 3
    return labels


def seg(path: Path, labels: np.ndarray, kind: str = "BINARY", *, order: int = 1, gap: bool = True) -> Path:
    """A segmentation as scanners' workstations write it: a frame for each segment and slice that is not empty."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66." + ("7" if kind == "LABELMAP" else "4")
    data.file_meta.MediaStorageSOPClassUID = UID(str(data.SOPClassUID))
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Modality, data.SegmentationType = "SEG", kind
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    segments = [0] if kind == "LABELMAP" else [1, 2, 3]
    cut = [
        (s, z) for s in segments for z in range(labels.shape[2]) if (labels[..., z] == s).any() or kind == "LABELMAP"
    ][::order]
    pictures = np.stack([labels[..., z].T if kind == "LABELMAP" else s == labels[..., z].T for s, z in cut])
    bits = 1 if kind == "BINARY" else 8
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits, bits - 1, 0
    data.Rows, data.Columns, data.NumberOfFrames = labels.shape[1], labels.shape[0], len(cut)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    if kind == "FRACTIONAL":
        data.MaximumFractionalValue = 200
        pictures = pictures * 120 + ~pictures * 90  # of 200: more and less than half
    data.PixelData = pack_bits(pictures.astype(np.uint8).ravel()) if bits == 1 else pictures.astype(np.uint8).tobytes()
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[*TURN[:, 0], *TURN[:, 1]])
    measures: dict[str, object] = {"PixelSpacing": [SPACING[1], SPACING[0]], "SliceThickness": SPACING[2]}
    shared.PixelMeasuresSequence = item(**measures, **({"SpacingBetweenSlices": SPACING[2]} if gap else {}))
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for segment, z in cut:
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=(ORIGIN + TURN @ (SPACING * [0, 0, z])).tolist())
        if segment:
            frame.SegmentIdentificationSequence = item(ReferencedSegmentNumber=segment)
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def reference(labels: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(labels.T.astype(np.float32) + np.random.default_rng(0).random(labels.T.shape))
    image.SetOrigin(ORIGIN.tolist())
    image.SetSpacing(SPACING.tolist())
    image.SetDirection(TURN.ravel().tolist())
    return image


@pytest.mark.parametrize(("kind", "order"), [("BINARY", 1), ("BINARY", -1), ("FRACTIONAL", 1), ("LABELMAP", -1)])
def test_a_segmentation_is_a_label_map_on_its_images_lattice(tmp_path: Path, kind: str, order: int) -> None:
    labels = volume()
    path = seg(tmp_path / "seg.dcm", labels, kind, order=order)
    sitk.WriteImage(reference(labels), str(tmp_path / "ct.nii.gz"))
    found, _ = Source().label(path, image=tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(found.array, labels)
    alone, _ = read_label(path)
    assert alone.array.shape[2] == (8 if kind == "LABELMAP" else 7)  # the first slice is empty
    shape, affine = header(path)
    at = affine @ [3, 4, 2, 1] * [-1, -1, 1, 1]
    z = 2 if kind == "LABELMAP" else 3
    np.testing.assert_allclose(at[:3], reference(labels).TransformIndexToPhysicalPoint((3, 4, z)), atol=1e-4)
    assert shape == alone.array.shape and read_voxels(path, "auto")[2] == "nearest"


def test_a_segmentation_without_the_distance_of_its_slices_takes_the_smallest(tmp_path: Path) -> None:
    labels = volume()
    data = pydicom.dcmread(seg(tmp_path / "seg.dcm", labels, gap=False))
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = 2.2  # thinner than the steps
    data.save_as(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_label(tmp_path / "seg.dcm")[0].array, labels[..., 1:])


def test_overlaps_are_said_and_frames_without_places_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pydicom.dcmread(seg(tmp_path / "seg.dcm", volume()))
    for frame in data.PerFrameFunctionalGroupsSequence:
        frame.PlanePositionSequence = item(ImagePositionPatient=ORIGIN.tolist())
    data.save_as(tmp_path / "flat.dcm")
    assert read_label(tmp_path / "flat.dcm")[0].array.shape == (16, 12) and "segments overlap" in caplog.text
    del data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    data.save_as(tmp_path / "nowhere.dcm")
    with pytest.raises(InputError, match="nowhere.dcm: a segmentation whose frames do not say"):
        read_label(tmp_path / "nowhere.dcm")

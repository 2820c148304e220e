"""Truth: the volume that the frames were cut from; pydicom's decoding; ITK where the frames lie in its order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pydicom
import pytest
from nibabel.affines import apply_affine
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    RTDoseStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from helpers.series import LPS, write_dicom, write_series
from regpipe.io.images import header, is_series, read_image
from regpipe.utils.errors import InputError

Z, T = 6, 3
VOLUMES = np.random.default_rng(5).integers(0, 4000, (T, Z, 7, 9)).astype(np.uint16)  # rows, columns
AFFINE = np.array([[-0.7, 0, 0, 8], [0, -1.2, 0.9, 7], [0, 0.4, 2.7, 10], [0, 0, 0, 1]])
AFFINE[:3, 1] *= 1.2 / np.linalg.norm(AFFINE[:3, 1])
AFFINE[:3, 2] = 3 * np.cross(AFFINE[:3, 0], AFFINE[:3, 1]) / (0.7 * 1.2)


def item(**tags: Any) -> Dataset:
    data = Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def frame(k: int, t: int, affine: np.ndarray = AFFINE, shared: bool = True, **more: Any) -> Dataset:
    axes = LPS @ affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    place = LPS @ apply_affine(affine, [0, 0, k])
    content = item(
        StackID="1", InStackPositionNumber=k + 1, TemporalPositionIndex=t + 1, DimensionIndexValues=[1, k + 1]
    )
    data = item(
        PlanePositionSequence=[item(ImagePositionPatient=[f"{v:.10g}" for v in place])],
        FrameContentSequence=[content],
        **more,
    )
    turn = [item(ImageOrientationPatient=[f"{v:.10g}" for v in (*axes[:, 0], *axes[:, 1])])]
    data.PlaneOrientationSequence = turn
    return data


def enhanced(
    path: Path, order: Sequence[tuple[int, int]], frames: Sequence[Dataset] | None = None, **tags: Any
) -> Path:
    """A file with the frames (k, t) in an order."""
    size = [item(PixelSpacing=["1.2", "0.7"], SliceThickness="3")]
    about: dict[str, Any] = {
        "NumberOfFrames": len(order),
        "SharedFunctionalGroupsSequence": [item(PixelMeasuresSequence=size)],
        "PerFrameFunctionalGroupsSequence": frames or [frame(k, t) for k, t in order],
    }
    pixels = np.stack([VOLUMES[t, k] for k, t in order])
    return write_dicom(path, pixels, **({"sop": EnhancedMRImageStorage} | about | tags))


ORDERS = {
    "ascending": [*range(Z)],
    "descending": [*range(Z)][::-1],
    "interleaved": [*range(0, Z, 2), *range(1, Z, 2)],
    "shuffled": [3, 0, 5, 1, 4, 2],
}


@pytest.mark.parametrize("sop", [EnhancedMRImageStorage, LegacyConvertedEnhancedCTImageStorage])
@pytest.mark.parametrize("order", ORDERS)
def test_each_frame_lies_where_it_says(tmp_path: Path, order: str, sop: Any) -> None:
    path = enhanced(tmp_path / "a.dcm", [(k, 0) for k in ORDERS[order]], sop=sop)
    image = read_image(path)
    np.testing.assert_array_equal(image.array, VOLUMES[0].T)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    assert header(path)[0] == (9, 7, Z)
    if order == "ascending":
        theirs = itk.imread(str(path), itk.F)
        np.testing.assert_array_equal(itk.array_from_image(theirs).T, image.array)
        for index in ((0, 0, 0), (8, 2, 5)):
            place = LPS @ np.array(theirs.TransformIndexToPhysicalPoint(index))
            np.testing.assert_allclose(apply_affine(image.affine, index), place, atol=1e-3)


@pytest.mark.parametrize("by_index", [False, True])
def test_frames_of_several_times_are_a_film_of_volumes(tmp_path: Path, by_index: bool) -> None:
    order = [(k, t) for k in ORDERS["shuffled"] for t in (2, 0, 1)]
    frames, tags = [frame(k, t) for k, t in order], {}
    if by_index:  # a dimension of its own in place of a temporal position
        for data, (k, t) in zip(frames, order, strict=True):
            del data.FrameContentSequence[0].TemporalPositionIndex
            data.FrameContentSequence[0].DimensionIndexValues = [1, k + 1, t + 1]
        pointers = [0x00209056, 0x00209057, 0x00189082]  # stack, position in it, effective echo time
        tags = {"DimensionIndexSequence": [item(DimensionIndexPointer=pointer) for pointer in pointers]}
    path = enhanced(tmp_path / "a.dcm", order, frames, **tags)
    for t in range(T):
        image = read_image(f"{path}#{t}")
        np.testing.assert_array_equal(image.array, VOLUMES[t].T)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    with pytest.raises(InputError, match="holds 3 frames.*#0 to #2"):
        read_image(path)


def test_each_frame_has_its_own_scale(tmp_path: Path) -> None:
    order = [(k, 0) for k in ORDERS["shuffled"]]
    frames = [
        frame(
            k,
            0,
            PixelValueTransformationSequence=[item(RescaleSlope=f"{0.5 + k}", RescaleIntercept="-3", RescaleType="US")],
        )
        for k, _ in order
    ]
    image = read_image(enhanced(tmp_path / "a.dcm", order, frames))
    np.testing.assert_allclose(image.array, (VOLUMES[0] * (0.5 + np.arange(Z))[:, None, None] - 3).T, rtol=1e-5)


def test_frames_that_are_no_volume_are_named(tmp_path: Path) -> None:
    across = AFFINE.copy()
    across[:3, :3] = AFFINE[:3, :3][[2, 0, 1]]
    scout = [frame(k, 0, affine) for affine in (AFFINE, across) for k in range(3)]
    order = [(k, 0) for k in range(Z)]
    with pytest.raises(
        InputError, match=r"a.dcm: holds 2 stacks of slices \((axial, \w+|\w+, axial|\w+, \w+)\); split"
    ):
        read_image(enhanced(tmp_path / "a.dcm", order, scout))
    with pytest.raises(InputError, match="b.dcm: holds from 1 to 2 frames at its 6 places"):
        read_image(enhanced(tmp_path / "b.dcm", [*order, (2, 1)]))
    with pytest.raises(InputError, match="c.dcm: slices are missing: a gap of 6.00 mm between frame 2 and frame 3"):
        read_image(enhanced(tmp_path / "c.dcm", order[:2] + order[3:]))
    mosaic = write_dicom(tmp_path / "m.dcm", VOLUMES[0, 0], ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    with pytest.raises(InputError, match="Siemens mosaic.*dcm2niix"):
        read_image(mosaic)


def test_planes_of_one_place_are_a_film(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a.dcm", [(2, t) for t in (1, 0, 2)])
    np.testing.assert_array_equal(read_image(f"{path}#1").array, VOLUMES[1, 2].T)


@pytest.mark.parametrize("step", [3, -3])
def test_a_dose_lies_where_its_offsets_say(tmp_path: Path, step: int) -> None:
    path = write_dicom(
        tmp_path / "dose.dcm",
        VOLUMES[0],
        sop=RTDoseStorage,
        NumberOfFrames=Z,
        FrameIncrementPointer=0x3004000C,
        GridFrameOffsetVector=[str(step * k) for k in range(Z)],
        ImagePositionPatient=[1, 2, 3],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=["2", "1.5"],
        DoseGridScaling="0.01",
    )
    image = read_image(path)
    k = 4 if step > 0 else Z - 1 - 4  # frame 4 lies 12 mm from the first
    np.testing.assert_allclose(image.array[:, :, k], VOLUMES[0, 4].T * 0.01, rtol=1e-5)
    np.testing.assert_allclose(LPS @ apply_affine(image.affine, [1, 1, k]), [2.5, 4, 3 + 4 * step])


@pytest.mark.parametrize("frames", [1, 3])
def test_ultrasound_has_its_regions_pixel_size(tmp_path: Path, frames: int, caplog: pytest.LogCaptureFixture) -> None:
    def region(delta: float, width: int, **more: Any) -> Dataset:
        tags: dict[str, Any] = {"PhysicalDeltaX": delta, "PhysicalDeltaY": 2 * delta, "RegionSpatialFormat": 1}
        tags |= {"PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3, "RegionDataType": 1}
        tags |= {"RegionLocationMinX0": 0, "RegionLocationMinY0": 0, "RegionLocationMaxY1": 6}
        return item(**(tags | {"RegionLocationMaxX1": width} | more))

    regions = [region(0.5, 2), region(0.02, 8), region(0.3, 9, RegionSpatialFormat=3, PhysicalUnitsXDirection=4)]
    many: dict[str, Any] = {"NumberOfFrames": frames, "FrameTime": "40", "FrameIncrementPointer": 0x00181063}
    sop = UltrasoundImageStorage if frames == 1 else UltrasoundMultiFrameImageStorage
    pixels = VOLUMES[0, 0] if frames == 1 else VOLUMES[:frames, 0]
    more = {} if frames == 1 else many
    path = write_dicom(tmp_path / "us.dcm", pixels, sop=sop, SequenceOfUltrasoundRegions=regions, **more)
    image = read_image(path if frames == 1 else f"{path}#1")
    np.testing.assert_allclose(image.affine, np.diag([-0.2, -0.4, 1]))
    assert "spacing" not in caplog.text


def test_ybr_is_the_grey_of_its_rgb(tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    ybr = pydicom.pixels.convert_color_space(rgb, "RGB", "YBR_FULL")
    path = write_dicom(tmp_path / "a.dcm", ybr, PlanarConfiguration=0, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(read_image(path).array.T, rgb @ [0.2125, 0.7154, 0.0721], atol=1.5)


def test_free_texts_do_not_split_a_series(tmp_path: Path) -> None:
    for i, path in enumerate(write_series(tmp_path / "a", VOLUMES[0].T, AFFINE)):
        data = pydicom.dcmread(path)
        data.SeriesDescription, data.ProtocolName, data.SequenceName = f"slice {i}", f"p{i}", f"s{i % 2}"
        data.save_as(path)
    image = read_image(tmp_path / "a")
    np.testing.assert_array_equal(image.array, VOLUMES[0].T)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)


def test_slices_of_one_place_are_told_apart_by_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a"
    for t, echo in ((0, "9.5"), (1, "12.5"), (2, "100")):
        for k, path in enumerate(write_series(tmp_path / "one", VOLUMES[t].T, AFFINE, EchoTime=echo)):
            data = pydicom.dcmread(path)
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[f"{t} {k}"])
            folder.mkdir(exist_ok=True)
            data.save_as(folder / f"{path.name}{2 - t}")
    assert is_series(folder)
    with caplog.at_level(logging.WARNING):
        for t in range(3):
            image = read_image(f"{folder}#{t}")
            np.testing.assert_array_equal(image.array, VOLUMES[t].T)
            np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    assert "frames by their EchoTime: 9.5, 12.5, 100" in caplog.text


def test_a_localiser_is_named_by_its_planes(tmp_path: Path) -> None:
    plain = np.diag([-1.0, -1, 3, 1])
    write_series(tmp_path / "a", VOLUMES[0].T, plain)
    turned = plain[[0, 2, 1, 3]]
    for path in write_series(tmp_path / "b", VOLUMES[0, :2].T, turned):
        path.rename(tmp_path / "a" / f"c{path.name}")
    with pytest.raises(InputError, match="a: its slices are not parallel .*6 x axial of 9 x 7.*2 x coronal"):
        read_image(tmp_path / "a")

"""Truth: blocks moved by whole voxels in numpy, the files as nibabel and SimpleITK see them, SimpleITK's nearest."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image as Picture
from scipy import ndimage
from scipy.spatial import cKDTree

from helpers.folders import save
from regpipe.data.load import LoadPair
from regpipe.fields.algebra import warp
from regpipe.io.images import make_grid
from regpipe.io.labels import is_label_map, look_of, read_label, whole_numbers
from regpipe.io.source import Source
from regpipe.transforms.apply import apply
from regpipe.utils.errors import InputError

AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])  # ITK's axes
MANY = np.r_[np.arange(2, 60), np.arange(1001, 1036)]  # ids of aparc+aseg's kind


def blocks(ids: np.ndarray, dtype: type = np.int16) -> np.ndarray:
    rng = np.random.default_rng(1)
    array: np.ndarray = np.zeros((24, 24, 24), dtype)
    for i in ids:
        x, y, z = rng.integers(0, 20, 3)
        array[x : x + 5, y : y + 5, z : z + 5] = i
    return array


def grey(largest: int = 250) -> np.ndarray:
    """Whole numbers of an image: smooth, with noise, 0 around it."""
    rng = np.random.default_rng(2)
    array = ndimage.gaussian_filter(rng.random((24, 24, 24)), 2)
    array = (array - array.min()) / np.ptp(array) * largest + rng.normal(0, 0.02 * largest, array.shape)
    array[:4] = 0
    return array.clip(0, largest).astype(np.int16)


def shift(folder: Path, *mm: float) -> Path:
    """Pulls an image by so many LPS mm."""
    file = folder / "shift.tfm"
    sitk.WriteTransform(sitk.TranslationTransform(3, mm), str(file))
    return file


def method_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    apply(shift(path.parent, 0.7, 0.3, 0.5), [path], path.parent / "out", reference=path)
    return capsys.readouterr().out.rpartition("(")[2].partition(")")[0]


LABELS = """
sub-01_dseg aparc+aseg aparc.a2009s+aseg wmparc parc atlas sub-01_labels lesion_mask brainmask tumour_roi
left_roi2 annotation lh_annot seg Segmentation-label x_labelmap_3 sub-01_seg-2 manualSeg"""
IMAGES = """
mask_removed_T1 seg_input_T2w sub-01_label-brain_T1w atlas_space_bold unmasked roi_centred_ct sub-01_seg_flair
dseg_less_pet label_free_microscopy"""


def pulled(path: Path, method: int) -> np.ndarray:
    transform = sitk.ReadTransform(str(path.parent / "shift.tfm"))
    image = sitk.ReadImage(str(path), sitk.sitkFloat64)
    return sitk.GetArrayFromImage(sitk.Resample(image, transform, method)).T


def test_a_name_that_ends_like_a_label_maps_is_one_and_keeps_its_ids(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{name}.nii.gz", blocks(MANY), AFFINE) for name in LABELS.split()]
    outs = apply(shift(tmp_path, 0.7, 0.3, 0.5), paths, tmp_path / "out", reference=paths[0])
    expected = pulled(paths[0], sitk.sitkNearestNeighbor)
    for out in outs:
        moved = nib.Nifti1Image.from_filename(out)
        assert moved.get_data_dtype() == np.int16, out
        np.testing.assert_array_equal(np.asarray(moved.dataobj), expected, out.name)


def test_a_word_within_the_name_of_an_image_makes_no_label_map(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{name}.nii.gz", grey(), AFFINE) for name in IMAGES.split()]
    outs = apply(shift(tmp_path, 0.7, 0.3, 0.5), paths, tmp_path / "out", reference=paths[0])
    expected = pulled(paths[0], sitk.sitkLinear)
    for out in outs:
        moved = np.asarray(nib.Nifti1Image.from_filename(out).dataobj)
        np.testing.assert_allclose(moved, expected, atol=1e-3, err_msg=out.name)


def with_intent(path: Path, array: np.ndarray, intent: str) -> Path:
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_intent(intent)
    nib.save(image, path)
    return path


def test_a_file_that_says_what_it_is_is_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name, array in (("ids", blocks(MANY)), ("grey", grey()), ("halves", blocks(MANY) / 2)):
        assert method_of(with_intent(tmp_path / f"{name}.nii", array, "label"), capsys) == "nearest"
    assert (
        "halves.nii: says that it is a label map and holds fractions" in caplog.text and "grey.nii" not in caplog.text
    )
    for array in (blocks(MANY), grey()):
        sitk.WriteImage(sitk.GetImageFromArray(array.T), str(tmp_path / "ct.seg.nrrd"))
        assert method_of(tmp_path / "ct.seg.nrrd", capsys) == "nearest"


@pytest.mark.parametrize(
    ("name", "array", "expected", "told"),
    [
        ("a", blocks(MANY), "nearest", "taken for a label map, by its 9"),  # says nothing, looks like labels
        ("b", blocks(np.arange(1, 9)), "nearest", None),
        ("c", (grey() > 90).astype(np.uint8), "nearest", None),
        ("d", grey(), "linear", None),
        ("e", grey(30), "linear", None),  # an image of few values
        ("e", grey(12), "linear", "taken for an image, by its 13 values"),
        ("brainmask", grey(), "linear", "named like a label map and looks like an image"),  # FreeSurfer's is an image
        ("labels/f", grey(), "linear", "named like a label map and looks like an image"),
        ("g_mask", grey() / 250, "linear", "holds fractions, taken for an image"),  # probabilities
        ("h_probseg", grey() / 250, "linear", None),
        ("i_seg", blocks(np.arange(1, 6)) / 5, "nearest", "holds fractions, in flat regions"),
        ("j", blocks(np.arange(1, 6)) / 5, "linear", None),
        ("k", 1e-3 * grey() / 250, "linear", None),  # within 1e-3 of 0, all of it
        ("labelsTr/l", blocks(MANY), "nearest", None),
        (
            "n",
            np.kron(np.arange(216, dtype=np.int16).reshape(6, 6, 6), np.ones((4, 4, 4), np.int16)),
            "nearest",
            "by its 216 values",
        ),  # cells
        (
            "p",
            np.random.default_rng(0).poisson(3, (24, 24, 24)).astype(np.int16),
            "linear",
            "taken for an image",
        ),  # counts
        ("r", np.kron(grey()[::2, ::2], np.ones((3, 3, 1))), "linear", "is taken for an image"),  # voxels repeated
        ("r", np.kron(grey(4000)[::2, ::2], np.ones((3, 3, 1))), "linear", "is taken for an image"),
        ("q", np.where(np.random.default_rng(0).random((24, 24, 24)) > 0.999, 9, 0), "nearest", None),  # points
        ("m_seg", np.where(blocks(MANY) > 0, blocks(MANY), np.nan), "nearest", None),  # as SPM writes no label
    ],
)
def test_voxels_say_what_names_do_not(
    tmp_path: Path,
    name: str,
    array: np.ndarray,
    expected: str,
    told: str | None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = save(tmp_path / f"{name}.nii.gz", array.astype({"f": np.float32}.get(array.dtype.kind, np.int16)), AFFINE)
    assert method_of(path, capsys) == expected
    assert (told in caplog.text) if told else not caplog.records, caplog.text


def cells(count: int, *shape: int) -> np.ndarray:
    """0, 1, ...: cells that touch, numbered row by row."""
    seeds = np.random.default_rng(0).random((count, len(shape))) * shape
    seeds = seeds[np.lexsort(seeds.T[::-1])]
    places = np.moveaxis(np.indices(shape), 0, -1)
    return cKDTree(seeds).query(places)[1].astype(np.int64)


@pytest.mark.parametrize("array", [cells(400, 200, 200), cells(1000, 60, 60, 60)], ids=["2-D", "3-D"])
def test_cells_whose_numbers_have_gaps_are_labels(array: np.ndarray) -> None:
    some = np.sort(np.random.default_rng(1).choice(4 * array.max(), array.max() + 1, replace=False))
    for ids in (array, array * 3 + 3, array + 3 * (array > 50), some[array]):
        assert look_of(ids).label


@pytest.mark.parametrize("largest", [250, 4000, 60000])
@pytest.mark.parametrize("step", [1, 16])
def test_repeated_voxels_of_any_depth_are_an_image(largest: int, step: int) -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(2).random((128, 128)), 6)
    grey = np.rint((smooth - smooth.min()) / np.ptp(smooth) * largest).astype(np.int64) * step
    assert not look_of(np.kron(grey, np.ones((3, 3), np.int64))).label


def test_flat_shades_in_order_are_an_image_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, y = np.indices((200, 200)) - 99.5
    sectors = (np.arctan2(x, y) + np.pi) / (2 * np.pi) * 72
    assert not is_label_map(tmp_path / "a.nii", sectors.astype(np.int16) + 1, False)
    assert "is taken for an image, by its 72 values; else give --interpolation nearest" in caplog.text


def scaled(path: Path, stored: np.ndarray, slope: float) -> Path:
    save(path, stored, AFFINE)
    data = bytearray(path.read_bytes())
    data[112:120] = struct.pack("<ff", slope, 0)
    path.write_bytes(bytes(data))
    return path


def test_nearly_whole_numbers_are_labels_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = blocks(np.arange(1, 6), np.uint8)
    files = {
        scaled(tmp_path / "scaled.nii", labels * 51, 1 / 51): np.uint8,
        scaled(tmp_path / "thirds.nii", (labels * 3).astype(np.int16), 1 / 3): np.int16,
        save(tmp_path / "below.nii", (labels * np.float32(0.9999999)), AFFINE): np.float32,
        save(tmp_path / "above.nii", labels + np.float64(4e-4), AFFINE): np.float64,
        save(
            tmp_path / "around.nii", labels + np.random.default_rng(0).normal(0, 1e-5, labels.shape), AFFINE
        ): np.float64,
    }
    for path, dtype in files.items():
        np.testing.assert_array_equal(read_label(path)[0].array, labels)
        assert method_of(path, capsys) == "nearest"
        moved = nib.Nifti1Image.from_filename(tmp_path / "out" / path.name)
        found = np.asarray(moved.dataobj)
        assert moved.get_data_dtype() == dtype and set(np.unique(found)) == set(range(6))
        assert (np.rint(found[1:-1, 1:-1, 1:-1]) == labels[1:-1, 1:-1, 1:-1]).all()  # by less than half a voxel
    assert whole_numbers(np.array([0, 0.9, 2])) is None and whole_numbers(np.array([0, np.inf])) is None


LARGE: dict[type[np.generic], list[int]] = {
    np.int64: [3, 2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**62) - 1],
    np.uint64: [3, 2**32 + 1, 2**53 + 1, 2**63 - 1],
    np.uint32: [3, 2**24 + 1, 2**32 - 1],
    np.int32: [3, 312782547, 2**31 - 1],
    np.int8: [3, -7, 127],
}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("method", ["nearest", "label"])
def test_ids_up_to_2_to_the_63_and_their_type_stay(
    tmp_path: Path, suffix: str, dtype: type[np.generic], method: str
) -> None:
    labels: np.ndarray = np.zeros((20, 18, 16), dtype)
    for i, value in enumerate(LARGE[dtype]):
        labels[3 * i : 3 * i + 3, 4:12, 5:11] = value
    path = tmp_path / f"a_seg{suffix}"
    image = sitk.GetImageFromArray(labels.T)
    image.SetSpacing((2, 2, 2))
    sitk.WriteImage(image, str(path))
    (out,) = apply(shift(tmp_path, -4, 2, 0), [path], tmp_path / "out", reference=path, interpolation=method)
    expected = np.zeros_like(labels)
    expected[2:, :-1] = labels[:-2, 1:]
    moved = sitk.ReadImage(str(out))
    assert moved.GetPixelID() == image.GetPixelID()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(moved).T, expected)
    np.testing.assert_allclose(moved.GetSpacing(), (2, 2, 2))
    np.testing.assert_array_equal(read_label(path)[0].array.astype(dtype), labels)


def test_itk_reads_what_is_written_where_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image = sitk.GetImageFromArray(rng.integers(0, 5, (6, 7, 8)).astype(np.int32))
    image.SetOrigin((1.5, -20.25, 7))
    image.SetSpacing((0.7, 1.3, 2.1))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    image.SetDirection(turn.ravel())
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(image, str(tmp_path / f"a_seg{suffix}"))
        (out,) = apply(
            shift(tmp_path, 0, 0, 0),
            [tmp_path / f"a_seg{suffix}"],
            tmp_path / "o",
            reference=tmp_path / f"a_seg{suffix}",
        )
        found = sitk.ReadImage(str(out))
        for part in ("Origin", "Spacing", "Direction"):
            np.testing.assert_allclose(getattr(found, f"Get{part}")(), getattr(image, f"Get{part}")(), atol=1e-9)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(image))


def test_a_mask_in_grey_colours_keeps_its_two_values(tmp_path: Path) -> None:
    mask = (ndimage.gaussian_filter(np.random.default_rng(0).random((20, 30)), 2) > 0.5).astype(np.uint8) * 255
    for mode in ("RGB", "RGBA"):
        Picture.fromarray(mask).convert(mode).save(tmp_path / f"{mode}_mask.png")
    sitk.WriteTransform(sitk.TranslationTransform(2, (0.7, 0.3)), str(tmp_path / "t.tfm"))
    paths = [tmp_path / "RGB_mask.png", tmp_path / "RGBA_mask.png"]
    for out in apply(tmp_path / "t.tfm", paths, tmp_path / "out", reference=paths[0]):
        moved = np.asarray(Picture.open(out))
        assert set(np.unique(moved)) == {0, 255} and (moved[:-1, :-1] == mask[:-1, 1:]).all()


def test_large_ids_meet_in_a_registration(tmp_path: Path) -> None:
    """Allen's atlas has ids of 614454277; float32 holds whole numbers up to 2^24."""
    ids = np.array([0, 312782546, 312782547, 2**53 + 1], np.int64)
    labels = ids[np.kron(np.arange(8).reshape(2, 2, 2) % 4, np.ones((4, 4, 4), int))]
    files = {
        "fixed_image": save(tmp_path / "i.nii", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)),
        "fixed_label": tmp_path / "l.nii",
    }
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=np.int64), files["fixed_label"])
    case = {"case": "a"} | {k.replace("fixed", side): str(v) for side in ("fixed", "moving") for k, v in files.items()}
    item = LoadPair(make_grid((8, 8, 8), (1, 1, 1)), affine="none")(case, Source())
    assert set(item["fixed_label"].unique().tolist()) == set(ids.tolist())
    u = torch.zeros(1, 3, 8, 8, 8)
    u[:, 0] = 4
    moved = warp(item["fixed_label"][None], u, mode="nearest")
    assert moved.dtype == torch.int64 and (moved[0, 0, :4] == item["fixed_label"][0, 4:]).all()


def test_labels_that_are_an_image_are_refused_for_a_registration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels are whole numbers"):
        read_label(save(tmp_path / "a_seg.nii", grey() / 250))

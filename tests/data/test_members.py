"""Truth: SimpleITK lays a cropped label map on its image; names are written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regpipe.data.checks import check_pairs
from regpipe.data.load import LoadPair
from regpipe.data.pairs import list_pairs
from regpipe.io.images import make_grid
from regpipe.io.source import Source
from regpipe.utils.errors import InputError

RNG = np.random.default_rng(21)


def scan() -> sitk.Image:
    image = sitk.GetImageFromArray(RNG.random((20, 18, 16)).astype(np.float32))
    image.SetSpacing((2, 1.5, 2))
    image.SetOrigin((-20, -30, 5))
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    image.SetDirection(turn.ravel())
    return image


def labels_of(image: sitk.Image) -> sitk.Image:
    return sitk.Cast(image * 5, sitk.sitkUInt8)


def cut(image: sitk.Image, kind: str) -> sitk.Image:
    """A part of the image's lattice, or beyond it, or turned."""
    if kind == "beyond":
        return sitk.ConstantPad(image[3:, :, :], (0, 2, 1), (1, 0, 3), 0)
    part = image[4:14, 2:15, 5:18]
    return {
        "part": part,
        "flipped": sitk.Flip(part, (True, False, True)),
        "permuted": sitk.PermuteAxes(part, (2, 0, 1)),
    }[kind]


@pytest.mark.parametrize("kind", ["part", "beyond", "flipped", "permuted"])
def test_a_cropped_label_is_laid_on_its_images_lattice(tmp_path: Path, kind: str) -> None:
    image = scan()
    crop = cut(labels_of(image), kind)
    sitk.WriteImage(image, str(tmp_path / "ct.nrrd"))
    sitk.WriteImage(crop, str(tmp_path / "ct.seg.nrrd"))
    found = Source().label(tmp_path / "ct.seg.nrrd", image=tmp_path / "ct.nrrd")[0]
    truth = sitk.Resample(crop, image, sitk.Transform(3, sitk.sitkIdentity), sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(found.array, sitk.GetArrayFromImage(truth).T)
    case = {"case": "a"} | {
        f"{s}_{k}": str(tmp_path / n)
        for s in ("fixed", "moving")
        for k, n in (("image", "ct.nrrd"), ("label", "ct.seg.nrrd"))
    }
    assert check_pairs([case], files=Source()) == {}


def test_a_label_between_the_voxels_is_not_laid_but_named(tmp_path: Path) -> None:
    image = scan()
    off = cut(labels_of(image), "part")
    off.SetOrigin(np.array(off.GetOrigin()) + [0.8, 0.6, 0])  # by half a voxel
    sitk.WriteImage(image, str(tmp_path / "ct.nrrd"))
    sitk.WriteImage(off, str(tmp_path / "ct.seg.nrrd"))
    case = {"case": "a", "fixed_label": str(tmp_path / "ct.seg.nrrd")}
    case |= {f"{side}_image": str(tmp_path / "ct.nrrd") for side in ("fixed", "moving")}
    assert "ct.seg.nrrd: not on its image's grid" in check_pairs([case], files=Source())["a"]


def test_what_belongs_to_an_image_may_have_a_word_more_in_its_name(tmp_path: Path) -> None:
    image = scan()
    for folder in ("images", "labels", "masks", "landmarks"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c"):
        sitk.WriteImage(image, str(tmp_path / "images" / f"{name}.nrrd"))
    for file in (
        "labels/a.seg.nrrd",
        "labels/b_dseg.nii.gz",
        "labels/c-label.mha",
        "masks/a_mask.nrrd",
        "masks/b.nrrd",
    ):
        sitk.WriteImage(labels_of(image), str(tmp_path / file))
    for file in ("a.mrk.json", "b.fcsv", "c_landmarks.csv"):
        (tmp_path / "landmarks" / file).write_text("x,y,z\n1,2,3\n")
    cases = {case["fixed_image"][-6:-5]: case for case in list_pairs(tmp_path)}
    named = {
        k: {kind: Path(v[f"fixed_{kind}"]).name for kind in ("label", "mask", "landmarks") if f"fixed_{kind}" in v}
        for k, v in cases.items()
    }
    assert named == {
        "a": {"label": "a.seg.nrrd", "mask": "a_mask.nrrd", "landmarks": "a.mrk.json"},
        "b": {"label": "b_dseg.nii.gz", "mask": "b.nrrd", "landmarks": "b.fcsv"},
        "c": {"label": "c-label.mha", "landmarks": "c_landmarks.csv"},
    }
    sitk.WriteImage(labels_of(image), str(tmp_path / "labels" / "a.nrrd"))
    with pytest.raises(InputError, match="belongs to the same image; keep one"):
        list_pairs(tmp_path)


def test_a_segmentation_beside_its_image_is_no_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sitk.WriteImage(scan(), str(tmp_path / f"{name}.nrrd"))
    sitk.WriteImage(labels_of(scan()), str(tmp_path / "a.seg.nrrd"))
    cases = list_pairs(tmp_path)
    assert [case["case"] for case in cases] == ["b_to_a", "a_to_b"]
    assert Path(cases[0]["fixed_label"]).name == Path(cases[1]["moving_label"]).name == "a.seg.nrrd"


def test_a_loaded_pair_has_its_landmarks_in_the_order_of_their_names(tmp_path: Path) -> None:
    sitk.WriteImage(scan(), str(tmp_path / "i.nrrd"))
    case = {"case": "a"} | {
        f"{s}_{k}": str(tmp_path / n)
        for s in ("fixed", "moving")
        for k, n in (("image", "i.nrrd"), ("landmarks", f"{s}.csv"))
    }
    (tmp_path / "fixed.csv").write_text("label,x,y,z\nnasion,-18,-20,8\ninion,-10,-18,20\ntip,-5,-15,30\n")
    (tmp_path / "moving.csv").write_text(
        "name,l,p,s\ntip,-5,-15,30\nelse,-9,-9,9\nnasion,-18,-20,8\ninion,-10,-18,20\n"
    )
    assert check_pairs([case]) == {}
    load = LoadPair(make_grid((16, 18, 20), (2, 1.5, 2)), affine="none")
    for _ in range(2):  # the second time from memory
        item = load(case)
        assert item["fixed_landmarks"].shape == (3, 3)
        np.testing.assert_allclose(item["fixed_landmarks"], item["moving_landmarks"], atol=1e-4)
    aligned = LoadPair(make_grid((16, 18, 20), (2, 1.5, 2)), affine="rigid", affine_from="landmarks")(case)
    np.testing.assert_allclose(aligned["fixed_affine"], aligned["moving_affine"], atol=1e-6)
    (tmp_path / "moving.csv").write_text("name,x,y,z\nleft,-5,-15,30\nright,-9,-9,9\n")
    assert "moving.csv: no name as in" in check_pairs([case])["a"]

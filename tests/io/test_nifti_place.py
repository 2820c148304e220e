"""Every header of a NIfTI, against SimpleITK: a point of our transform files must be where ITK has it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from regpipe.io.images import header, read_image
from regpipe.transforms import displacement
from regpipe.utils.errors import InputError

SHAPE = (7, 6, 5)
ARRAY = np.random.default_rng(0).random(SHAPE).astype(np.float32)
SIZE = (2, 1.5, 3)


def turned(*degrees: float) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * SIZE
    affine[:3, 3] = [-20, 30, 12]
    return affine


ONE, OTHER = turned(10, -20, 30), turned(0, 0, 15)
LEFT = ONE @ np.diag([-1, 1, 1, 1.0])
SHEARED = ONE + np.outer(ONE[:, 0], [0, 0, 0.2, 0])
SIZES = {"positive": (1, *SIZE), "negative": (1, -2, 1.5, 3), "other": (1, 1, 1, 1), "no qfac": (0, *SIZE)}


def headers() -> dict[str, dict[str, Any]]:
    """Name -> form, code, unit and pixdim."""
    places = {"neither": {}, "sform": {"s": ONE, "sc": 1}, "qform": {"q": ONE, "qc": 1}}
    found: dict[str, dict[str, Any]] = {
        f"{name}, unit {unit}, {size}": {**place, "unit": unit, "size": SIZES[size]}
        for (name, place), unit, size in itertools.product(places.items(), range(4), SIZES)
    }
    for sc, qc in itertools.product(range(1, 5), range(1, 5)):
        found[f"both {sc} {qc}"] = {"s": OTHER, "sc": sc, "q": ONE, "qc": qc}
        found[f"equal {sc} {qc}"] = {"s": ONE, "sc": sc, "q": ONE, "qc": qc}
    found |= {"left": {"s": LEFT, "sc": 1}, "left q": {"q": LEFT, "qc": 1}}
    for sc, qc in ((-1, 1), (9, 1), (0, 7), (9, 0), (2, -1)):  # codes that are none
        found[f"code {sc} {qc}"] = {"s": OTHER, "sc": sc, "q": ONE, "qc": qc}
    for qfac in (-0.3, 2, 0):
        found[f"qfac {qfac}"] = {"q": LEFT, "qc": 1, "size": (qfac, *SIZE)}
    return found | {"sheared with a qform": {"s": SHEARED, "sc": 1, "q": ONE, "qc": 1}}


def write(path: Path, about: dict[str, Any], array: np.ndarray = ARRAY, kind: Any = nib.Nifti1Image) -> Path:
    """The header as it is said, behind nibabel's back."""
    image = kind(array, None)
    for form in "sq":
        if form in about:
            getattr(image.header, f"set_{form}form")(about[form], code=1)
    whole, n = image.to_bytes(), image.header.sizeof_hdr
    fields = np.frombuffer(whole[:n], image.header.template_dtype).copy()
    pixdim = about.get("size", (1, *SIZE))
    fields["pixdim"][0, : len(pixdim)] = pixdim
    fields["sform_code"], fields["qform_code"] = about.get("sc", 0), about.get("qc", 0)
    fields["xyzt_units"] = about.get("unit", 2)
    path.write_bytes(fields.tobytes() + whole[n:])
    return path


def by_itk(path: Path) -> np.ndarray:
    """RAS affine of what SimpleITK reads."""
    image = sitk.ReadImage(str(path))
    dim = image.GetDimension()
    affine = np.eye(dim + 1)
    affine[:dim, :dim] = np.array(image.GetDirection()).reshape(dim, dim) * image.GetSpacing()
    affine[:dim, dim] = image.GetOrigin()
    affine[:2] *= -1
    return affine


def apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...] = SHAPE) -> float:
    corners = np.array([*np.ndindex(*[2] * len(shape))]) * (np.array(shape) - 1)
    return float(np.abs((one - other)[:-1] @ np.c_[corners, np.ones(len(corners))].T).max())


@pytest.mark.parametrize("about", headers().values(), ids=headers())
def test_a_nifti_lies_where_itk_has_it(tmp_path: Path, about: dict[str, Any]) -> None:
    path = write(tmp_path / "a.nii", about)
    unit = {1: 1e3, 3: 1e-3}.get(about.get("unit", 2), 1)
    assert apart(read_image(path).affine, by_itk(path)) < 1e-3 * unit
    assert apart(read_image(path).affine, header(path)[1]) == 0


@pytest.mark.parametrize("place", [{}, {"s": ONE, "sc": 1}, {"q": ONE, "qc": 1, "unit": 3}], ids=str)
def test_nifti_2_follows_the_same_rules(tmp_path: Path, place: dict[str, Any]) -> None:
    one, two = (write(tmp_path / f"{k.__name__}.nii", place, kind=k) for k in (nib.Nifti1Image, nib.Nifti2Image))
    assert apart(read_image(two).affine, by_itk(one)) < 1e-3


@pytest.mark.parametrize("size", [(2, 1.5, 3), (-2, 1.5, 3)])
@pytest.mark.parametrize("orient", range(7))
def test_analyze_and_pairs_follow_itk(tmp_path: Path, size: tuple[float, ...], orient: int) -> None:
    nib.save(nib.AnalyzeImage(ARRAY, np.diag([2, 1.5, 3, 1])), tmp_path / "a.hdr")
    data = bytearray((tmp_path / "a.hdr").read_bytes())
    data[80:92] = np.array(size, "<f4").tobytes()
    data[252] = orient
    (tmp_path / "a.hdr").write_bytes(data)
    assert apart(read_image(tmp_path / "a.hdr").affine, by_itk(tmp_path / "a.hdr")) < 1e-3
    nib.save(nib.Nifti1Pair(ARRAY, ONE), tmp_path / "b.img")
    assert apart(read_image(tmp_path / "b.img").affine, by_itk(tmp_path / "b.img")) < 1e-3


@pytest.mark.parametrize(
    "about",
    [
        *[{}, {"q": OTHER, "qc": 1}, {"s": OTHER, "sc": 2, "unit": 3}, {"s": OTHER, "sc": 1, "unit": 1}],
        *[{form: place, f"{form}c": 1} for form in "sq" for place in (ONE, turned(90, 0, 0), turned(0, 90, 0))],
        {"q": turned(180, 0, 20), "qc": 1, "size": (0, -2, 1.5, 0)},
    ],
    ids=lambda about: " ".join(about),
)
def test_a_picture_in_a_nifti_lies_where_itk_has_it(tmp_path: Path, about: dict[str, Any]) -> None:
    path = write(tmp_path / "a.nii", about, ARRAY[:, :, 0])
    image = read_image(path)
    found = image.affine if image.stored is None else image.stored  # oblique: its shadow, sheared
    assert apart(found, by_itk(path), SHAPE[:2]) < 1e-3 * (1e3 if about.get("unit") == 1 else 1)


def test_voxels_without_a_size_are_refused_whatever_the_form_says(tmp_path: Path) -> None:
    for about in ({}, {"s": ONE, "sc": 1}, {"q": ONE, "qc": 1}):
        with pytest.raises(InputError, match="voxel size 0 x 1.5 x 3 mm; mend its header"):
            read_image(write(tmp_path / "a.nii", {**about, "size": (1, 0, 1.5, 3)}))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_quaternion_that_rounding_made_longer_is_followed(tmp_path: Path, kind: type) -> None:
    half = turned(180, 0, 0)
    path = write(tmp_path / "a.nii", {"q": half, "qc": 1}, kind=kind)
    data, exact = bytearray(path.read_bytes()), read_image(path).affine
    at, number = (256, "<f4") if kind is nib.Nifti1Image else (352, "<f8")
    values = np.frombuffer(data, number, 3, at) * (1 + 2e-6)  # nibabel alone refuses it
    data[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(path)
    assert apart(read_image(path).affine, exact) < 1e-3
    if kind is nib.Nifti1Image:
        assert apart(read_image(path).affine, by_itk(path)) < 1e-3


def test_a_quaternion_longer_than_1_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", {"q": ONE, "qc": 1})
    data = bytearray(path.read_bytes())
    data[256:268] = np.array([0.9, 0.8, 0.1], "<f4").tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match="the quaternion of its qform is longer than 1.*mend its header"):
        read_image(path)


@pytest.mark.parametrize("scale", [(0, 5), (np.nan, 5), (np.inf, 0), (-2, 1), (1, -1024)], ids=str)
def test_values_are_scaled_as_itk_scales_them(tmp_path: Path, scale: tuple[float, float]) -> None:
    path = write(tmp_path / "a.nii", {"s": ONE, "sc": 1}, (ARRAY * 1000).astype(np.int16))
    data = bytearray(path.read_bytes())
    data[112:120] = np.array(scale, "<f4").tobytes()
    path.write_bytes(data)
    assert np.array_equal(read_image(path).array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (116, np.float32(np.nan), "its scl_inter is no number; mend its header"),
        (108, np.float32(0), "its voxels begin within its header, by its vox_offset; mend that"),
        (40, np.array([4, 7, 6, 5, 0], np.int16), r"its shape is \(7, 6, 5, 0\); mend its header"),
    ],
)
def test_a_header_that_cannot_be_followed_is_refused_with_what_to_mend(
    tmp_path: Path, at: int, value: np.generic, words: str
) -> None:
    path = write(tmp_path / "a.nii", {"s": ONE, "sc": 1})
    data = bytearray(path.read_bytes())
    data[112:116] = np.float32(2).tobytes()
    data[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_image(path)


def test_what_itk_refuses_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.nii", {"s": SHEARED, "sc": 1})
    with pytest.raises(RuntimeError):
        by_itk(path)
    read_image(path)
    assert "ITK refuses where its header puts it (sheared); placed by nibabel" in caplog.text


def test_an_upright_picture_keeps_its_voxel_sizes_and_no_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coronal = np.array([[2, 0, 0, -20], [0, 0, 3, 30], [0, 1.5, 0, 12], [0, 0, 0, 1.0]])
    path = write(tmp_path / "a.nii", {"s": coronal, "sc": 1, "q": coronal, "qc": 1}, ARRAY[..., 0])
    assert np.allclose(read_image(path).affine, np.diag([2, 1.5, 1]))
    assert "its place is left out, voxel sizes are kept" in caplog.text


def test_what_itk_and_nibabel_see_otherwise_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for about, words in (
        ({"s": ONE, "sc": 1}, ""),
        ({"s": ONE, "sc": 4, "q": ONE, "qc": 4}, ""),
        ({}, "neither sform nor qform is set; placed as ITK, ANTs and Slicer place it, up to 14.1 mm from where nib"),
        ({"s": OTHER, "sc": 2, "q": ONE, "qc": 1}, "mm apart at a corner, the qform is used; placed as ITK"),
        ({"s": OTHER, "sc": 1, "q": ONE, "qc": 1}, "mm apart at a corner, the sform is used"),
        ({"s": ONE, "sc": 1, "unit": 3}, "its unit is microns; placed as ITK"),
        ({"s": ONE, "sc": 1, "size": (1, 1, 1, 1)}, "placed as ITK"),
    ):
        caplog.clear()
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.nii", about)
        read_image(path)
        read_image(path)
        assert words in caplog.text and len(caplog.records) == bool(words), caplog.text


def test_a_displacement_lies_where_itk_has_it(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ARRAY[..., None, None].repeat(3, -1), None)
    image.header.set_zooms((*SIZE, 1, 1))
    image.header.set_intent("vector")
    nib.save(image, tmp_path / "field.nii")
    assert apart(displacement.read_displacement(tmp_path / "field.nii")[1], by_itk(tmp_path / "field.nii")) < 1e-3


NRRD = """NRRD0005
type: float
dimension: 3
{space}
sizes: 7 6 5
space directions: {directions}
space origin: (-20,30,12)
endian: little
encoding: raw

"""


@pytest.mark.parametrize("matrix", [ONE, LEFT, SHEARED], ids=["right-handed", "left-handed", "sheared"])
@pytest.mark.parametrize(
    "space",
    [
        "space: left-posterior-superior",
        "space: RAS",
        "space: left-anterior-superior",
        "space dimension: 3",
        'space: RAS\nspace units: "um" "um" "um"',
    ],
)
def test_a_nrrd_lies_where_itk_has_it(tmp_path: Path, space: str, matrix: np.ndarray) -> None:
    directions = " ".join(f"({','.join(f'{v:.9g}' for v in column)})" for column in matrix[:3, :3].T)
    path = tmp_path / "a.nrrd"
    path.write_bytes(NRRD.format(space=space, directions=directions).encode() + ARRAY.tobytes("F"))
    image = read_image(path)
    if matrix is not SHEARED:
        assert apart(image.affine, by_itk(path)) < 1e-3
        return
    inside = by_itk(path) @ [3, 3, 2, 1]  # resampled: a voxel's value is found where ITK has the voxel
    at = np.linalg.inv(image.affine) @ inside
    assert ((at[:3] > 0) & (at[:3] < image.array.shape)).all()


def test_a_nrrd_of_two_axes_in_space_is_refused_with_what_to_do(tmp_path: Path) -> None:
    text = NRRD.format(space="space: RAS", directions="(2,0,0) (0,0,1)").replace("dimension: 3", "dimension: 2")
    path = tmp_path / "a.nrrd"
    path.write_bytes(text.replace("7 6 5", "7 6").encode() + ARRAY[:, :, 0].tobytes("F"))
    with pytest.raises(InputError, match="save it with 3 axes, one of 1 voxel"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_voxel_size_below_0_mirrors_as_in_itk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    head = "NRRD0005\ntype: float\ndimension: 3\nsizes: 7 6 5\nspacings: -2 1 3\nendian: little\nencoding: raw\n\n"
    if suffix == ".mha":
        head = "ObjectType = Image\nNDims = 3\nElementSpacing = -2 1 3\nOffset = 1 2 3\nDimSize = 7 6 5\n"
        head += "ElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
    path.write_bytes(head.encode() + ARRAY.tobytes("F"))
    assert apart(read_image(path).affine, by_itk(path)) < 1e-6
    assert np.array_equal(read_image(path).array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T)

"""Truth: SimpleITK, nitransforms, surfa and elastix's own transformix on the same files; closed forms."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import itk
import nibabel as nib
import nitransforms
import numpy as np
import pytest
import SimpleITK as sitk
from nitransforms.io import lta
from scipy.io import savemat

from helpers.registered import at, turned
from regpipe.io.geometry import lps_matrix
from regpipe.transforms.read import read_transform
from regpipe.utils.errors import InputError

POINTS = np.array([[10.0, 20, 30], [-5, 7, 1], [0, 0, 0], [40, -33, 12]])
RAS = np.eye(4)
RAS[:3, :3] = turned(3, (9, -6, 4)) * [1.05, 0.97, 1.1]
RAS[:3, 3] = [3, -4, 5.5]
TWELVE = " ".join(f"{v:.12g}" for v in [*RAS[:3, :3].ravel(), *RAS[:3, 3]])


def moved(path: Path, *, points: bool = True) -> np.ndarray:
    transform = read_transform(path, points=points)
    return np.array(
        [list(transform.TransformPoint(p)) for p in POINTS[:, : transform.GetInputSpaceDimension()].tolist()]
    )


def lps(ras: np.ndarray) -> np.ndarray:
    return at(lps_matrix(ras), POINTS)


def rows(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(f"{v:.15g}" for v in row) for row in matrix) + "\n"


@pytest.mark.parametrize("real", ["double", "float"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("suffix", [".txt", ".tfm", ".mat", ".h5"])
def test_the_base_class_of_affines_is_read_as_an_affine(tmp_path: Path, real: str, dim: int, suffix: str) -> None:
    path, kind = tmp_path / f"t{suffix}", f"MatrixOffsetTransformBase_{real}_{dim}_{dim}"
    values, centre = np.r_[RAS[:dim, :dim].ravel(), RAS[:dim, 3]], np.arange(1.0, dim + 1)
    if suffix == ".mat":
        savemat(path, {kind: values[:, None], "fixed": centre[:, None]}, format="4")
    elif suffix == ".h5":
        with h5py.File(path, "w") as file:
            group = file.create_group("TransformGroup/0")
            group.create_dataset("TransformType", data=np.array([kind], object), dtype=h5py.string_dtype("ascii"))
            group.create_dataset("TransformFixedParameters", data=centre)
            group.create_dataset("TransformParameters", data=values)
    else:
        numbers = " ".join(f"{v:.12g}" for v in values)
        path.write_text(
            f"#Insight Transform File V1.0\n#Transform 0\nTransform: {kind}\nParameters: {numbers}\n"
            f"FixedParameters: {' '.join(map(str, centre))}\n"
        )
    shifted = (POINTS[:, :dim] - centre) @ RAS[:dim, :dim].T + RAS[:dim, 3] + centre
    np.testing.assert_allclose(moved(path), shifted, atol=1e-4)
    if suffix in (".txt", ".tfm"):
        judge = sitk.ReadTransform(str(path))
        np.testing.assert_allclose(shifted, [judge.TransformPoint(p) for p in POINTS[:, :dim].tolist()], atol=1e-4)


def test_afnis_matrix_is_in_dicoms_mm_from_fixed_to_moving(tmp_path: Path) -> None:
    path = tmp_path / "t.aff12.1D"
    nitransforms.linear.Affine(RAS).to_filename(str(path), fmt="afni")
    np.testing.assert_allclose(moved(path), lps(RAS), atol=1e-4)
    np.testing.assert_allclose(moved(path, points=False), lps(RAS), atol=1e-4)
    three = tmp_path / "three.1D"
    three.write_text("# a comment\n" + rows(lps_matrix(RAS)[:3]))
    np.testing.assert_allclose(moved(three), lps(RAS), atol=1e-4)
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(InputError, match="matrix for each of 2 frames"):
        read_transform(path)


def test_an_x5_is_in_ras_mm_from_fixed_to_moving(tmp_path: Path) -> None:
    pytest.importorskip("nitransforms", "25", reason="older ones write none")
    path = tmp_path / "t.x5"
    nitransforms.linear.Affine(RAS).to_filename(str(path), fmt="x5")
    np.testing.assert_allclose(moved(path), lps(RAS), atol=1e-9)


@pytest.mark.parametrize("comment", ["", "# command_history: mrregister\n", "# mrtrix\n\n"])
def test_plain_numbers_are_niftyregs_and_mrtrixs(
    tmp_path: Path, comment: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.txt"
    path.write_text(comment + rows(RAS))
    np.testing.assert_allclose(moved(path), lps(RAS), atol=1e-9)
    assert "NiftyReg" in caplog.text and "fsl2ras" in caplog.text


def test_flirts_matrix_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "flirt.mat"
    path.write_text("1  0  0  3  \n0  1  0  -4  \n0  0  1  5.5  \n0  0  0  1  \n")
    with pytest.raises(InputError, match=r"FLIRT's matrix.*c3d_affine_tool .* flirt.mat -fsl2ras -oitk"):
        read_transform(path)


def volume(shape: tuple[int, ...], affine: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.zeros(shape, np.uint8), affine)


@pytest.mark.parametrize("kind", [0, 1])
def test_an_lta_takes_points_of_src_to_dst_and_pulls_images_the_other_way(tmp_path: Path, kind: int) -> None:
    source, target = np.diag([-2.0, 2, 3, 1]), RAS @ np.diag([1.0, 1.5, 1, 1])
    made = lta.FSLinearTransform.from_ras(np.linalg.inv(RAS), volume((9, 8, 7), target), volume((4, 5, 6), source))
    if kind == 0:
        made.structarr["m_L"] = np.linalg.inv(target) @ RAS @ source
        made.structarr["type"] = 0
    path = tmp_path / "t.lta"
    path.write_text(made.to_string())
    np.testing.assert_allclose(moved(path), lps(RAS), atol=1e-4)
    pull = nitransforms.linear.load(str(path), fmt="fs").matrix
    np.testing.assert_allclose(moved(path, points=False), lps(pull), atol=1e-3)
    # surfa is FreeSurfer's own
    import surfa

    world = surfa.load_affine(str(path)).convert(space="world").matrix
    np.testing.assert_allclose(world, RAS, atol=1e-4)


def test_an_xfm_is_what_simpleitk_and_minc_read(tmp_path: Path) -> None:
    path = tmp_path / "talairach.xfm"
    body = rows(RAS[:3]).rstrip()
    path.write_text(f"MNI Transform File\n% tkregister2\n\nTransform_Type = Linear;\nLinear_Transform = \n{body};\n")
    judge = sitk.ReadTransform(str(path))  # takes the numbers as they are: RAS mm
    flip = [-1, -1, 1]
    by_sitk = [judge.TransformPoint(p) for p in (POINTS * flip).tolist()]
    np.testing.assert_allclose(moved(path), np.array(by_sitk) * flip, atol=1e-6)
    np.testing.assert_allclose(moved(path), lps(RAS), atol=1e-6)
    np.testing.assert_allclose(moved(path, points=False), lps(np.linalg.inv(RAS)), atol=1e-6)
    path.write_text("MNI Transform File\nTransform_Type = Grid_Transform;\nDisplacement_Volume = a.mnc;\n")
    with pytest.raises(InputError, match="MINC transform of Grid_Transform"):
        read_transform(path)


BASE = """(Transform "{kind}")
(NumberOfParameters {n})
(TransformParameters {values})
(InitialTransformParameterFileName "{before}")
(HowToCombineTransforms "Compose")
(FixedImageDimension {dim})
(MovingImageDimension {dim})
(FixedInternalImagePixelType "float")
(MovingInternalImagePixelType "float")
(Size {size})
(Index {zeros})
(Spacing {ones})
(Origin {zeros})
(Direction {eye})
(UseDirectionCosines "true")
(Interpolator "LinearInterpolator")
(ResampleInterpolator "FinalLinearInterpolator")
(Resampler "DefaultResampler")
"""
KINDS = [
    ("TranslationTransform", 3, [3, -4, 5.5], ""),
    ("EulerTransform", 2, [0.1, 3, -4], "(CenterOfRotationPoint 5 6)"),
    ("EulerTransform", 3, [0.1, -0.2, 0.15, 3, -4, 5], '(CenterOfRotationPoint 5 6 7)\n(ComputeZYX "false")'),
    ("EulerTransform", 3, [0.1, -0.2, 0.15, 3, -4, 5], '(CenterOfRotationPoint 5 6 7)\n(ComputeZYX "true")'),
    ("SimilarityTransform", 2, [1.1, 0.1, 3, -4], "(CenterOfRotationPoint 5 6)"),
    ("SimilarityTransform", 3, [0.05, -0.1, 0.07, 3, -4, 5, 1.1], "(CenterOfRotationPoint 5 6 7)"),
    ("AffineTransform", 2, [1.1, 0.1, -0.05, 0.9, 3, -4], "(CenterOfRotationPoint 5 6)"),
    ("AffineTransform", 3, [*RAS[:3, :3].ravel(), 3, -4, 5], "(CenterOfRotationPoint 5 6 7)"),
    (
        "BSplineTransform",
        2,
        np.random.default_rng(1).normal(0, 2, 2 * 8 * 7).round(4).tolist(),
        "(GridSize 8 7)\n(GridIndex 0 0)\n(GridSpacing 12 13)\n(GridOrigin -20 -25)\n"
        '(GridDirection 0.8 0.6 -0.6 0.8)\n(BSplineTransformSplineOrder 3)\n(UseCyclicTransform "false")',
    ),
]


def parameters(path: Path, kind: str, dim: int, values: list[float], more: str, before: str) -> None:
    words = {"zeros": " ".join(["0"] * dim), "ones": " ".join(["1"] * dim), "size": " ".join(["60"] * dim)}
    words |= {"eye": " ".join(f"{v:g}" for v in np.eye(dim).ravel()), "values": " ".join(f"{v:.10g}" for v in values)}
    path.write_text(BASE.format(kind=kind, n=len(values), dim=dim, before=before, **words) + more + "\n")


def by_transformix(path: Path, dim: int) -> np.ndarray:
    held = itk.ParameterObject.New()
    held.AddParameterFile(str(path))
    points = path.with_suffix(".pts")
    points.write_text(f"point\n{len(POINTS)}\n" + rows(POINTS[:, :dim]))
    image = itk.image_from_array(np.zeros([60] * dim, np.float32))
    tool = itk.TransformixFilter.New(image, transform_parameter_object=held)
    tool.SetFixedPointSetFileName(str(points))
    tool.SetOutputDirectory(str(path.parent))
    tool.SetLogToConsole(False)
    tool.Update()
    lines = (path.parent / "outputpoints.txt").read_text().splitlines()
    found = [line.split("OutputPoint = [")[1].split("]")[0].split() for line in lines]
    return np.array(found, float)


@pytest.mark.parametrize(("kind", "dim", "values", "more"), KINDS)
def test_elastixs_parameters_are_what_transformix_does(
    tmp_path: Path, kind: str, dim: int, values: list[float], more: str
) -> None:
    path = tmp_path / "TransformParameters.0.txt"
    parameters(path, kind, dim, values, more, "NoInitialTransform")
    np.testing.assert_allclose(moved(path), by_transformix(path, dim), atol=1e-4)


def test_an_initial_transform_of_elastix_comes_first(tmp_path: Path) -> None:
    first, second = (tmp_path / f"TransformParameters.{i}.txt" for i in range(2))
    parameters(first, *KINDS[2], "NoInitialTransform")
    parameters(second, *KINDS[7], str(first))
    np.testing.assert_allclose(moved(second), by_transformix(second, 3), atol=1e-4)
    first.unlink()
    with pytest.raises(InputError, match=r"TransformParameters.0.txt, which is not beside it"):
        read_transform(second)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "t.txt",
            '(Transform "SplineKernelTransform")\n(FixedImageDimension 3)\n',
            "SplineKernelTransform.*ITKTransform",
        ),
        ("register.dat", "bert\n1\n1\n0.15\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\nround\n", "register.dat needs.*ltaout"),
        ("old.dat", "bert\n1\n1\n0.15\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "register.dat needs.*ltaout"),
        ("t.mat", "MATLAB 5.0 MAT-file, Platform", "a MATLAB 5 or 7 file"),
        ("t.mat", "MATLAB 7.3 MAT-file, Platform", "a MATLAB 5 or 7 file"),
        ("t.m3z", "\x1f", "mri_warp_convert --inm3z t.m3z"),
        ("t.trm", "3 4 5\n1 0 0\n0 1 0\n0 0 1\n", "BrainVISA's"),
        ("t.toml", 'NumberOfParameters = 12\nTransform = "AffineTransform"\n', "elastix's parameters as TOML"),
        ("t.txt", "0.1 0.2 0.3 1 2 3\n", "its numbers are 1 rows of 6, no matrix.*ITK's .tfm"),
        ("t.txt", "1 0 3\n0 1 4\n0 0 1\n", "its numbers are 3 rows of 3, no matrix.*ITK's .tfm"),
        ("t.txt", "1 0 0 nan\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "neither ITK's nor a matrix.*begins '1 0 0 nan'"),
        ("t.txt", "", "neither ITK's nor a matrix"),
        ("t.txt", "1 0 0 0\n0 1 0 0\n", "no matrix of 3 or 4 rows"),
        ("t.txt", "1 0 0 0\n1 0 0 0\n0 0 1 0\n0 0 0 1\n", "no inverse"),
        ("t.lta", "type = 1\nnxforms = 1\n1 4 4\n1 0 0", "cut off"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=told):
        read_transform(tmp_path / name)


def test_plain_numbers_in_a_dat_are_no_register_dat(tmp_path: Path) -> None:
    (tmp_path / "affine.dat").write_text("1 0 0 3\n0 1 0 4\n0 0 1 5\n0 0 0 1\n")
    np.testing.assert_allclose(moved(tmp_path / "affine.dat"), POINTS + [-3, -4, 5])  # RAS -> LPS


def test_a_mark_of_unicode_before_the_text_does_not_matter(tmp_path: Path) -> None:
    transform = sitk.AffineTransform(3)
    transform.Rotate(0, 1, 0.2)
    transform.SetTranslation((3, -4, 5))
    sitk.WriteTransform(transform, str(tmp_path / "a.tfm"))
    (tmp_path / "b.tfm").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.tfm").read_bytes())
    np.testing.assert_allclose(moved(tmp_path / "b.tfm"), moved(tmp_path / "a.tfm"))
    (tmp_path / "c.txt").write_text(rows(np.eye(4)), "utf-8-sig")
    np.testing.assert_allclose(moved(tmp_path / "c.txt"), POINTS)


def test_a_packed_transform_is_said_to_be_packed(tmp_path: Path) -> None:
    (tmp_path / "a.tfm.gz").write_bytes(gzip.compress(b"#Insight Transform File V1.0"))
    with pytest.raises(InputError, match="packed by gzip; unpack it, gunzip a.tfm.gz"):
        read_transform(tmp_path / "a.tfm.gz")


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_displacement_of_a_metaimage_or_nrrd_moves_points_as_in_simpleitk(
    tmp_path: Path, suffix: str, dim: int
) -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 8, 7)[:dim] + (dim,))
    field = sitk.GetImageFromArray(vectors, isVector=True)
    field.SetSpacing([20.0] * dim)
    field.SetOrigin([-60.0] * dim)
    sitk.WriteImage(field, str(tmp_path / f"d{suffix}"))
    truth = sitk.DisplacementFieldTransform(sitk.Image(field))  # which takes it away
    expected = [truth.TransformPoint(point) for point in POINTS[:, :dim].tolist()]
    np.testing.assert_allclose(moved(tmp_path / f"d{suffix}"), expected, atol=1e-9)
    sitk.WriteImage(sitk.VectorMagnitude(field), str(tmp_path / f"i{suffix}"))
    with pytest.raises(InputError, match="no displacement"):
        read_transform(tmp_path / f"i{suffix}")

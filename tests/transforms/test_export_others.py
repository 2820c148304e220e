"""The formats of FSL, FreeSurfer and Learn2Reg, by the closed formula of ``helpers.exported``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import nibabel as nib
import nitransforms
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from helpers.exported import WAY, dense, image_files, lps, placed, pulled_and_pulling, setup
from regpipe.transforms import export
from regpipe.transforms.displacement import resample_through
from regpipe.transforms.export import ImageFile


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, case = tmp_path_factory.mktemp("others"), setup(3)
    export.write_transforms(folder, case.pair, *image_files(case), formats=["fsl", "l2r"])
    return folder


@WAY
def test_fsl_takes_points_where_the_formula_does(way, written):
    if importlib.util.find_spec("fsl") is None:
        pytest.skip("fslpy is not installed")
    from fsl.data.image import Image as FslImage
    from fsl.transform import fnirt

    case = setup(3)
    pulled, pulling, move = pulled_and_pulling(case, way)
    src, ref = (FslImage(image.array, xform=image.affine) for image in (pulled, pulling))
    warp = fnirt.readFnirt(str(written / f"{way}_fsl.nii.gz"), src, ref, defType="relative")
    voxels = np.random.default_rng(10).integers(0, pulling.array.shape, (200, 3))
    points = apply_affine(pulling.affine, voxels)
    expected = move(case.pair, lps(points))
    np.testing.assert_allclose(lps(warp.transform(points, "world", "world")), expected, atol=1e-3)


@pytest.mark.parametrize("flips", [(0, 0), (0, None), (None, 0), (None, None)])
def test_fsl_agrees_with_flirts_matrix_where_all_is_affine(flips, tmp_path):
    """Both handednesses of both images: FSL's mm run backwards in one of them."""
    spacings = ((0.9, 1.1, 3.0), (1.3, 1.2, 1.4))
    angles = ([20.0, -10.0, 15.0], [-15.0, 25.0, 5.0])
    fixed, moving = (
        placed((9, 8, 7), mm, turn, flip=9 if flip is None else flip)
        for mm, turn, flip in zip(spacings, angles, flips, strict=True)
    )
    pair = setup(3).pair._replace(forward=np.zeros((3, 5, 5, 5)), inverse=np.zeros((3, 5, 5, 5)))
    sides = [ImageFile("a.nii", image.array.shape, image.affine, "") for image in (fixed, moving)]
    export.write_transforms(tmp_path, pair, *sides, formats=["fsl"])
    warp: Any = nib.load(tmp_path / "moving_to_fixed_fsl.nii.gz")
    assert warp.header["intent_code"] == 2006
    images = [nib.Nifti1Image(image.array, image.affine) for image in (moving, fixed)]
    flirt = nitransforms.io.fsl.FSLLinearTransform.from_ras(pair.matrix, *images).structarr["parameters"]
    voxels = np.random.default_rng(11).integers(0, (9, 8, 7), (50, 3))
    mm = voxels * [0.9, 1.1, 3.0]
    if np.linalg.det(fixed.affine) > 0:
        mm[:, 0] = 8 * 0.9 - mm[:, 0]
    moved = mm + np.asarray(warp.dataobj)[tuple(voxels.T)]
    np.testing.assert_allclose(apply_affine(flirt, moved), mm, atol=1e-3)  # FLIRT's matrix: moving -> fixed


@WAY
def test_freesurfer_takes_points_where_the_formula_does(way, tmp_path, monkeypatch):
    surfa = pytest.importorskip("surfa")
    monkeypatch.setattr(np, "fromstring", np.frombuffer)  # surfa 0.6.3 reads by a mode that NumPy 2.3 has removed
    case = setup(3)
    export.write_transforms(tmp_path, case.pair, *image_files(case), formats=["freesurfer"])
    warp = surfa.load_warp(str(tmp_path / f"{way}_freesurfer.mgz"))
    pulled, pulling, move = pulled_and_pulling(case, way)
    np.testing.assert_allclose(warp.source.vox2world.matrix, pulled.affine, atol=1e-4)
    np.testing.assert_allclose(warp.target.vox2world.matrix, pulling.affine, atol=1e-4)
    voxels = np.random.default_rng(12).integers(0, pulling.array.shape, (200, 3))
    there = warp.convert(surfa.Warp.Format.abs_crs).data[tuple(voxels.T)]  # voxels of the pulled image
    expected = move(case.pair, lps(apply_affine(pulling.affine, voxels)))
    np.testing.assert_allclose(lps(apply_affine(pulled.affine, there)), expected, atol=1e-3)


def test_learn2reg_warps_as_the_formula_does(written):
    """Its evaluation reads the moving image at ``identity + displacement``, in voxels."""
    case = setup(3)
    loaded: Any = nib.load(written / "moving_to_fixed_l2r.nii.gz")
    displacement = loaded.get_fdata()
    assert displacement.shape == (*case.fixed.array.shape, 3)
    identity = np.indices(case.fixed.array.shape)
    warped = ndimage.map_coordinates(case.moving.array, identity + np.moveaxis(displacement, -1, 0), order=1)
    d, inside = dense(case, "moving_to_fixed")
    expected = resample_through(case.moving, d, case.fixed.affine, order=1)
    np.testing.assert_allclose(warped[inside], expected[inside], atol=1e-4)

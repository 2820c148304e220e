"""What each command imports: nothing that takes long before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from helpers.commandline import regpipe
from regpipe.bundle.run import register_with_bundle
from regpipe.inference.register import one_pair, register_files
from regpipe.networks.weights import shipped

HEAVY: tuple[str, ...] = (
    "monai",
    "ignite",
    "torchvision",
    "tensorboard",
    "pandas",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "scipy.stats",
)
HEAVY += (
    "scipy.stats",
    "scipy.optimize",
    "SimpleITK",
    "mlflow",
    "matplotlib",
    "torch",
    "itk",
    "scipy",
    "nibabel",
    "PIL",
    "h5py",
)
# ITK's parts by the size of their libraries, 30 to 140 MB, beside ITKCommon and Elastix
HEAVY += tuple(
    f"itk._ITK{part}Python" for part in ("ImageIntensity", "LabelMap", "LevelSets", "ImageGrid", "Metricsv4")
)
ALWAYS = {"itk", "scipy", "nibabel", "PIL"}
CODE = "import json, sys; from regpipe.cli import main; main.app(sys.argv[2:], standalone_mode=False); "
CODE += "print(json.dumps([m for m in sys.argv[1].split() if m in sys.modules]))"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("pair"), np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((48, 40)), 3)
    image = (image - image.min()) / np.ptp(image)
    paths = [str(folder / f"{name}.nii.gz") for name in ("fixed", "moving")]
    for path, shift in zip(paths, (0, 2), strict=True):
        nib.save(nib.Nifti1Image(np.roll(image, shift, 0).astype(np.float32), np.eye(4)), path)
    return paths


def loaded(*words: object) -> set[str]:
    """The heavy modules that a command has loaded when it ends."""
    command = [sys.executable, "-c", CODE, " ".join(HEAVY), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_none() -> None:
    assert loaded("--help") == loaded("register", "--help") == set()


@pytest.mark.parametrize("bundle", ["resnet18", "none"])
def test_registering_loads_torch_itks_elastix_and_what_draws(pair, bundle, tmp_path) -> None:
    found = loaded("register", *pair, "--bundle", bundle, "--refine", "2", "-o", tmp_path)
    assert found == ALWAYS | {"torch", "h5py"}


def test_labels_are_measured_without_monai(pair, tmp_path) -> None:
    for path in pair:
        shape = (np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj) > 0.5).astype(np.uint8)
        nib.save(nib.Nifti1Image(shape, np.eye(4)), tmp_path / Path(path).name)
    labels = ["--fixed-label", tmp_path / "fixed.nii.gz", "--moving-label", tmp_path / "moving.nii.gz"]
    chosen = ["--bundle", "none", "--refine", "2", "--affine", "none"]
    assert "monai" not in loaded("register", *pair, *labels, *chosen, "-o", tmp_path / "out")
    (metrics,) = tmp_path.glob("out/*/metrics.json")
    assert json.loads(metrics.read_text())["hd95"] >= 0


@pytest.fixture(scope="module")
def case(pair, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        assert regpipe(patch, "register", *pair, "--bundle", "none", "--refine", 2, "--affine", "none", "-o", out) == 0
    (finished,) = out.glob("*/metrics.json")
    return finished.parent


def test_applying_loads_itks_sampler_and_no_more(pair, case, tmp_path) -> None:
    found = loaded("apply", case, pair[1], "-o", tmp_path / "applied")
    assert found == ALWAYS | {"h5py", "itk._ITKImageGridPython"}


@pytest.mark.parametrize(
    "command", [["compose", "-o", "chain.h5"], ["compose", "-o", "d.nii.gz"], ["jacobian", "-o", "j.nii.gz"]]
)
def test_composing_and_jacobians_load_itks_transforms_and_no_more(case, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    assert loaded(*command, case) == ALWAYS | {"h5py"}


def test_a_report_loads_what_draws_and_verifying_no_itk(case) -> None:
    assert loaded("report", case.parent) == {"scipy", "nibabel", "PIL"}
    assert loaded("verify", case) == {"torch", "scipy", "nibabel", "PIL"}


def test_a_shipped_bundle_gives_the_files_that_monai_bundle_run_gives(pair, tmp_path) -> None:
    bundle = shipped("resnet18", 2)
    assert bundle is not None
    dataset = one_pair(tmp_path / "pair.json", dict(zip(("fixed_image", "moving_image"), map(Path, pair), strict=True)))
    told: dict[str, Any] = {"refine": 3, "affine": "rigid", "formats": "itk,ants", "uncertainty": True}
    ckpt_dir = str(bundle.absolute() / "models" / "2d")
    register_with_bundle(bundle, dataset, tmp_path / "monai", {"ckpt_dir": ckpt_dir, **told})
    register_files(dataset, tmp_path / "ours", **told)
    theirs, ours = (
        {path.relative_to(tmp_path / way): path.read_bytes() for path in (tmp_path / way).rglob("*") if path.is_file()}
        for way in ("monai", "ours")
    )
    assert len(ours) > 15 and ours.keys() == theirs.keys() and any(p.name == "uncertainty.nii.gz" for p in ours)
    assert [path for path in ours if ours[path] != theirs[path]] == [p for p in ours if p.name == "manifest.json"]

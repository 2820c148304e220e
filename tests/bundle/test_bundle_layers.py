"""The two layers that a bundle names are those that its run warps and integrates by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import Command, deforming_bundle, evaluate, infer, train
from regpipe.bundle.write import write_bundle
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.phantoms.cohort import write_cohort
from regpipe.transforms.displacement import read_displacement

DVF2DDF = "$monai.networks.blocks.DVF2DDF(7, padding_mode='border')"
MONAI = ("--warp", "$monai.networks.blocks.Warp()", "--dvf2ddf", DVF2DDF)
FIELDS = ("displacement.nii.gz", "inverse_displacement.nii.gz")


@pytest.mark.parametrize("shape", [(32, 32), (20, 18, 22)])
def test_inference_with_monais_own_layers_gives_the_same_displacement(
    shape: tuple[int, ...], tmp_path: Path, monai_bundle: Command
) -> None:
    data = write_cohort(tmp_path / "data", kind="synthetic", shape=shape, n_pairs=1)
    bundle = deforming_bundle(tmp_path / "bundle", Grid(shape, (1.0,) * len(shape)))
    told = ("--formats", "[displacement]", "--affine", "none", "--repair", "False")
    for out, layers in (("ours", ()), ("monai", MONAI)):
        infer(monai_bundle, bundle, data, tmp_path / out, *told, *layers)
    for name in FIELDS:
        ours, theirs = (read_displacement(tmp_path / out / "case_000" / name)[0] for out in ("ours", "monai"))
        assert np.abs(ours).max() > 0.5 and np.abs(ours - theirs).max() < 1e-4  # voxels of 1 mm


@pytest.mark.parametrize("shape", [(32, 32), (20, 18, 22)])
def test_a_bundle_trains_and_evaluates_with_monais_own_layers_as_with_ours_and_says_so(
    shape: tuple[int, ...], tmp_path: Path, monai_bundle: Command
) -> None:
    cohort, found = write_cohort(tmp_path / "data", kind="synthetic", shape=shape, n_pairs=4), []
    for name, layers in (("ours", ()), ("monai", MONAI)):
        bundle = write_bundle("plain", tmp_path / name)
        told = ("--max_epochs", "1", "--holdout", "2", "--loss_weights", "{'lncc': 1, 'midway': 1, 'diffusion': 1}")
        train(monai_bundle, bundle, cohort, *told, *layers)
        recorded = json.loads((bundle / "models" / "manifest.json").read_text())["settings"]
        assert ("padding_mode=border" in recorded.get("dvf2ddf", "")) == bool(layers)
        evaluate(monai_bundle, bundle, cohort, "--refine", "4", *layers)
        found.append(read_rows(bundle / "eval" / "metrics.csv"))
    for ours, theirs in zip(*found, strict=True):
        for name in ("ncc", "sdlogj", "inverse_consistency"):
            assert ours[name] == pytest.approx(theirs[name], abs=0.01), name


def test_layers_that_move_nothing_register_nothing(cohort: Path, tmp_path: Path, monai_bundle: Command) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)))
    still = ("--dvf2ddf", "$lambda v: 0 * v", "--refine", "2")
    infer(monai_bundle, bundle, cohort, tmp_path / "out", "--formats", "[displacement]", "--affine", "none", *still)
    assert np.abs(read_displacement(tmp_path / "out" / "case_000" / FIELDS[0])[0]).max() == 0


def test_the_inverse_consistency_of_a_case_is_measured_by_the_layers_of_the_bundle(
    tmp_path: Path, monai_bundle: Command
) -> None:
    data = write_cohort(tmp_path / "data", kind="synthetic", shape=(32, 32), n_pairs=1)
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)), gain=1.0)  # moves next to nothing
    told = ("--formats", "[displacement]", "--affine", "none", "--warp", "$lambda image, u: image + 3")
    infer(monai_bundle, bundle, data, tmp_path / "out", *told)
    row = json.loads((tmp_path / "out" / "case_000" / "metrics.json").read_text())
    assert row["inverse_consistency"] == pytest.approx(3 * 2**0.5, rel=0.05)  # 3 voxels of 1 mm along both axes

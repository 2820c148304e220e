"""SYMNet from the command line: the axes that its authors' images have, and what their own code gives."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.bundles import Command
from helpers.commandline import regpipe
from helpers.places import DATA, ROOT
from regpipe.bundle.write import write_bundle
from regpipe.fields.algebra import register_midway
from regpipe.inference.symnet import GRID, SPACE, LoadAsAuthors, Turned
from regpipe.io.images import Grid, read_image
from regpipe.metrics.cases import read_rows
from regpipe.networks.symmetric import Prediction
from regpipe.networks.symnet import SymNet, authors_names
from regpipe.phantoms.cohort import write_cohort
from regpipe.transforms.displacement import read_displacement
from regpipe.utils.errors import cause


def test_images_in_the_authors_space_come_as_they_are_and_scaled_by_their_extremes(tmp_path: Path) -> None:
    rng, files = np.random.default_rng(0), {}
    for side in ("fixed", "moving"):
        image = rng.integers(0, 200, SPACE["shape"]).astype(np.uint8)
        files[side] = tmp_path / f"{side}.nii"
        nib.Nifti1Image(image, np.array(SPACE["affine"])).to_filename(files[side])
    case = {"case": "a", **{f"{side}_image": str(file) for side, file in files.items()}}
    item = LoadAsAuthors(GRID, affine="auto", space=SPACE)(case)
    seen: list[Tensor] = []
    Turned(Listening(seen))(torch.cat([item["fixed_image"], item["moving_image"]])[None])
    for channel, file in zip(seen[0][0], files.values(), strict=True):
        assert np.allclose(channel, read_image(file).array / 199)


class Listening(nn.Module):
    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, pair: Tensor) -> Prediction:
        self.seen.append(pair)
        return Prediction(pair[:, :1].repeat(1, 3, 1, 1, 1), pair[:, 1:].repeat(1, 3, 1, 1, 1))


def test_turning_the_images_and_the_fields_back_changes_no_registration() -> None:
    torch.manual_seed(0)
    net = SymNet(3, start_channels=2, limit=3.0).eval()
    pair = torch.rand(1, 2, 16, 18, 20)  # along left, down, front
    with torch.no_grad():
        theirs = register_midway(pair[:, :1], pair[:, 1:], *net(pair)[:2])
        upright = pair.flip(2, 3).transpose(3, 4)
        ours = register_midway(upright[:, :1], upright[:, 1:], *Turned(net)(upright)[:2])
    assert theirs.displacement.abs().max() > 0.1
    assert torch.allclose(ours.warped_moving, theirs.warped_moving.flip(2, 3).transpose(3, 4), atol=1e-5)
    left, down, front = theirs.displacement.flip(2, 3).transpose(3, 4).unbind(1)
    assert torch.allclose(ours.displacement, torch.stack([-left, front, -down], 1), atol=1e-4)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("--network", "symnet"), "go together"),
        (("--weights", "w.pth"), "go together"),
        (("--network", "symnet", "--weights", "w.pth", "--refine", "3"), "cannot be refined"),
        (("--network", "symnet", "--weights", "missing.pth"), "missing.pth"),
    ],
)
def test_what_does_not_go_is_refused(told, words, cohort: Path, tmp_path, monkeypatch, capsys) -> None:
    assert regpipe(monkeypatch, "register", cohort, "-o", tmp_path, *told) == 1
    assert words in capsys.readouterr().err


def authors_file(path: Path) -> Path:
    """Weights of a small SYMNet, moving things by voxels, under its authors' names."""
    torch.manual_seed(0)
    net = SymNet(3, start_channels=2)
    named = {theirs: net.state_dict()[ours] for ours, theirs in authors_names(net).items()}
    torch.save({name: t.flip(0) / 30 if name[:4] in ("dc9.", "dc10") else t for name, t in named.items()}, path)
    return path


def test_a_bundles_configuration_gives_what_the_command_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monai_bundle: Command
) -> None:
    data = write_cohort(tmp_path / "data", kind="mr", shape=(20, 26, 22), n_pairs=1)
    weights, small = authors_file(tmp_path / "w.pth"), Grid((16, 32, 16), (1.5, 1.0, 1.5))
    monkeypatch.setattr("regpipe.inference.symnet.GRID", small)
    told = ("--network", "symnet", "--weights", weights, "--formats", "displacement", "--uncertainty")
    assert regpipe(monkeypatch, "register", data, "-o", tmp_path / "command", *told) == 0
    bundle = write_bundle("plain", tmp_path / "bundle")
    configs = str([str(bundle / "configs" / "inference.yaml"), str(ROOT / "configs" / "symnet_inference.yaml")])
    places = ("--bundle_root", bundle, "--dataset_dir", data, "--output_dir", tmp_path / "bundles")
    formats = ("--formats", "[displacement]", "--uncertainty", "True")
    monai_bundle("run", "--config_file", configs, "--weights", weights, *places, *formats)
    for name in ("displacement.nii.gz", "inverse_displacement.nii.gz"):
        one, other = (read_displacement(tmp_path / of / "case_000" / name)[0] for of in ("command", "bundles"))
        assert np.array_equal(one, other) and np.abs(one).max() > 0.1
    unsure = [read_image(tmp_path / of / "case_000" / "uncertainty.nii.gz").array for of in ("command", "bundles")]
    assert np.array_equal(unsure[0], unsure[1]) and unsure[0].min() > 0
    rows = [read_rows(tmp_path / of / "metrics.csv") for of in ("command", "bundles")]
    assert [row["ncc"] for row in rows[0]] == [row["ncc"] for row in rows[1]]
    with pytest.raises(RuntimeError) as error:
        monai_bundle("run", "--config_file", configs, *places)
    assert "--weights: give the authors" in str(cause(error.value))


@pytest.mark.slow  # two minutes on one thread
def test_the_command_gives_what_the_authors_code_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DATA / "symnet"
    if not folder.is_dir():
        pytest.skip(f"no SYMNet weights and images in {folder} (set REGPIPE_DATA)")
    told = ("--network", "symnet", "--weights", folder / "symnet_oasis.pth", "--formats", "displacement")
    images = folder / "image_A.nii.gz", folder / "image_B.nii.gz"
    assert regpipe(monkeypatch, "register", *images, "-o", tmp_path, *told) == 0
    (case,) = (path.parent for path in tmp_path.glob("*/metrics.json"))
    inner = (slice(None), *[slice(2, -2)] * 3)  # 8 voxels in: their sampler pads with zeros
    matrix = np.diag([-1.0, -1.0, 1.0]) @ np.array(SPACE["affine"])[:3, :3]  # their voxels -> LPS mm
    with np.load(folder / "reference.npz") as reference:
        for file, name in (("displacement", "displacement_B_to_A"), ("inverse_displacement", "displacement_A_to_B")):
            d = read_displacement(case / f"{file}.nii.gz")[0][:, ::4, ::4, ::4]
            theirs = np.einsum("ij,jxyz->ixyz", matrix, reference[name])
            assert np.abs(d - theirs)[inner].max() < 5e-3  # mm

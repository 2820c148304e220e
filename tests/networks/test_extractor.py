"""What images may be compared by: the encoders here, and anybody's TorchScript."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.places import ROOT
from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import Refinement, zero_refiner
from regpipe.inference import memory
from regpipe.losses.similarity import feature_similarity
from regpipe.networks.encoders import Encoder
from regpipe.networks.extractor import Extractor, described, extractor
from regpipe.utils.errors import InputError


class Edges(nn.Module):
    """Differences along both axes; and beside them, at half resolution, the image itself."""

    def forward(self, image: Tensor) -> list[Tensor]:
        pad = F.pad(image, [0, 1, 0, 1], mode="replicate")
        edges = torch.cat([pad[:, :, 1:, :-1] - image, pad[:, :, :-1, 1:] - image], 1)
        half = F.avg_pool2d(image, 2)
        return [edges, torch.cat([half, 1 - half], 1)]


class Still(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.detach()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("scripts") / "edges.ts"
    torch.jit.script(Edges()).save(str(path))
    return str(path)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 2, 8, 8, generator=generator)
    return F.interpolate(low, (32, 32), mode="bicubic").chunk(2, 1)  # type: ignore[return-value]


def test_a_torchscript_file_is_compared_by_feature_by_feature_with_its_weights(script: str) -> None:
    a, b = images()
    apart = [1 - torch.cosine_similarity(x, y, dim=1).mean() for x, y in zip(Edges()(a), Edges()(b), strict=True)]
    for given, expected in (
        ("", (apart[0] + apart[1]) / 2),
        ("=1,0", apart[0]),
        ("=1,3", (apart[0] + 3 * apart[1]) / 4),
    ):
        found = float(feature_similarity(a, b, extractor(script + given, 2)))
        assert found == pytest.approx(float(expected), abs=2e-3)
    assert float(apart[0]) > 2 * float(apart[1])


def test_a_mask_leaves_out_what_features_see_there(script: str) -> None:
    a, b = images()
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, :16] = 1
    changed = b.clone()
    changed[:, :, 20:] = 0.3
    looks = extractor(script, 2)
    alike = [float(feature_similarity(a, x, looks, mask=mask)) for x in (b, changed)]
    assert alike[0] == pytest.approx(alike[1], abs=1e-6)
    assert float(feature_similarity(a, b, looks)) != pytest.approx(
        float(feature_similarity(a, changed, looks)), abs=1e-3
    )


@pytest.mark.parametrize(("dim", "strides"), [(2, (4, 8, 16)), (3, (4, 8, 16))])
def test_a_backbone_is_the_one_that_came_with_regpipe(dim: int, strides: tuple[int, ...]) -> None:
    looks = extractor("alexnet", dim)
    assert looks.strides == strides and not any(p.requires_grad for p in looks.parameters())
    shipped = Encoder("alexnet", dim, pretrained="shipped")
    named = extractor(f"alexnet:{ROOT / 'bundles/symreg_alexnet/models/2d/model.pt'}", 2)
    for one in (looks, named) if dim == 2 else (looks,):
        for mine, theirs in zip(one.parameters(), shipped.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_refinement_by_anybodys_features_finds_a_shift(script: str) -> None:
    a, _ = images()
    moved = torch.roll(a, 2, 2)
    velocity = zero_refiner("features", features=script, steps=60)(a, moved)
    assert float(velocity[0, 0, 6:11, 6:11].mean()) == pytest.approx(1.0, abs=0.25)  # voxels of half resolution
    with pytest.raises(InputError, match="takes no 3D images"):
        zero_refiner("features", features=script)(*torch.rand(2, 1, 1, 8, 8, 8))
    told = Refinement(1, {"features": 1.0}, features=script, spatial_dims=2)
    assert told.refiner() is not None
    said = told.asked()
    assert (
        said["features"] == "edges.ts"
        and said["features_sha256"] == hashlib.sha256(Path(script).read_bytes()).hexdigest()
    )
    with pytest.raises(InputError, match="spatial_dims"):
        told._replace(spatial_dims=None).refiner()


def test_what_is_said_of_it_has_no_folder_and_weights_stay(script: str) -> None:
    assert described("vgg16") == {"features": "vgg16"}
    assert described(script + "=1,0.5")["features"] == "edges.ts=1,0.5"
    weights = ROOT / "bundles/symreg_alexnet/models/2d/model.pt"
    assert described(f"alexnet:{weights}")["features"] == "alexnet:model.pt"
    assert described("alexnet:imagenet") == {"features": "alexnet:imagenet"}


def test_a_dry_run_tells_its_memory(script: str) -> None:
    for source in ("alexnet", script):
        few, many = (
            memory.inference(ZeroInferer(zero_refiner("features", features=source, steps=2)), nn.Identity(), (n, 64))
            for n in (64, 256)
        )
        assert few < many


def test_mistakes_are_said(script: str, tmp_path: Path) -> None:
    (tmp_path / "text.ts").write_text("no model")
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(str(tmp_path / "rgb.ts"))
    torch.jit.script(nn.Flatten()).save(str(tmp_path / "flat.ts"))
    torch.jit.script(Still()).save(str(tmp_path / "still.ts"))
    torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 8)), torch.rand(1, 1, 32, 32)).save(
        str(tmp_path / "one_size.ts")
    )
    for given, message in (
        ("resnet50", "give one of resnet18, vgg16, alexnet"),
        (str(tmp_path / "none.ts"), "no such file"),
        (str(tmp_path / "text.ts"), "no TorchScript"),
        (str(tmp_path / "rgb.ts"), "takes no image.*3 channels.*wrap it"),
        (str(tmp_path / "flat.ts"), "has to give tensors"),
        (f"{script}=1,2,3", "3 weights, and it gives 2 features"),
        (str(tmp_path / "still.ts"), "no gradient"),
        (str(tmp_path / "one_size.ts"), "has to give tensors"),
        (f"{script}=1,x", "give one of"),
        (f"{script}=1,-2", "numbers from 0 on"),
        ("alexnet:none", "give one of"),
        (f"{script}=0,0", "not all 0"),
    ):
        with pytest.raises(InputError, match=message):
            extractor(given, 2)
    assert len(Extractor(Edges())(torch.rand(1, 1, 8, 8))) == 2

"""One contract, one test for every backbone in 2D and 3D; and torchvision's own networks as oracle."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from regpipe.networks.encoders import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, TRANSFERRED, Encoder
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.symnet import SymNet
from regpipe.utils.errors import InputError

SIZES: dict[int, list[tuple[int, ...]]] = {
    2: [(64, 48), (33, 50), (5, 7), (1, 2)],
    3: [(32, 16, 24), (17, 9, 20), (3, 1, 2)],
}
EVERY = pytest.mark.parametrize(("backbone", "dims"), list(itertools.product(BACKBONES, (2, 3))))


@functools.cache
def theirs(backbone: str) -> Any:
    """The backbone's network without its classifier, of random weights and batch statistics, for evaluation."""
    torch.manual_seed(0)
    with torch.device("meta"):  # VGG16's classifier has 120 million weights
        net: Any = BACKBONES[backbone].build()
    net.classifier = net.fc = nn.Identity()
    net.to_empty(device="cpu")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) * 1.5 + 0.5
    return net.eval()


@functools.cache
def weight_file(backbone: str, folder: Path) -> str:
    if backbone == "pooled":  # which has none
        return "none"
    path = folder / f"{backbone}.pth"
    torch.save(theirs(backbone).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def images(size: tuple[int, ...], batch: int = 1) -> Tensor:
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1))


def ceil_div(size: tuple[int, ...], stride: int) -> tuple[int, ...]:
    return tuple(-(-n // stride) for n in size)


@EVERY
def test_every_encoder_keeps_the_contract(backbone: str, dims: int) -> None:
    encoder = Encoder(backbone, dims, max_stride=32)
    assert encoder.channels == BACKBONES[backbone].channels and encoder.strides == BACKBONES[backbone].strides
    assert list(encoder.strides) == sorted(encoder.strides)  # finest first
    for size in SIZES[dims]:
        features = encoder(images(size, batch=2))
        expected = [(2, c, *ceil_div(size, s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
        assert [tuple(f.shape) for f in features] == expected
        assert all(f.isfinite().all() for f in features)


@pytest.mark.parametrize(("backbone", "dims"), list(itertools.product([*TRANSFERRED, "plain"], (2, 3))))
def test_gradients_reach_every_free_weight_and_frozen_stages_keep_their_bytes(
    backbone: str, dims: int, files: Path
) -> None:
    encoder = Encoder(backbone, dims, pretrained=weight_file(backbone, files), freeze=2)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):  # in training mode, as built
        torch.stack([f.square().mean() for f in encoder(images(SIZES[dims][0]))]).sum().backward()
        optimiser.step()
    for name, parameter in encoder.named_parameters():
        frozen = name.startswith(("stages.0.", "stages.1."))
        assert (parameter.grad is None) == frozen and (frozen or parameter.grad.any()), name  # type: ignore[union-attr]
    for name, after in encoder.state_dict().items():
        statistics = "running" in name or "num_batches" in name
        stays = statistics or name.startswith(("stages.0.", "stages.1."))
        assert torch.equal(before[name], after) == stays, name


@pytest.mark.parametrize("dims", [2, 3])
def test_transferred_batch_statistics_are_frozen_in_either_mode(dims: int, files: Path) -> None:
    encoder = Encoder("resnet18", dims, pretrained=weight_file("resnet18", files))
    image = images(SIZES[dims][0])
    first = encoder(image)
    for mode in (encoder.train(), nn.Sequential(encoder).train()[0], encoder.eval(), encoder.train()):
        assert all(torch.equal(a, b) for a, b in zip(first, mode(image), strict=True))
    assert encoder.training and any("running_mean" in name for name in encoder.state_dict())


@pytest.mark.parametrize("dims", [2, 3])
def test_untransferred_encoders_know_no_batch(dims: int) -> None:
    encoder = Encoder("resnet18", dims)
    assert not any("running" in name for name in encoder.state_dict())
    two = images(SIZES[dims][1], batch=2)
    for both, one in zip(encoder(two), encoder(two[1:]), strict=True):
        assert torch.allclose(both[1:], one, atol=1e-4)


def torchvision_features(backbone: str, x: Tensor) -> list[Tensor]:
    """Stage by stage through torchvision's layers, x (B, 3, H, W); alexnet's padding as our contract has it."""
    net = theirs(backbone)
    if backbone == "resnet18":
        stem = net.relu(net.bn1(net.conv1(x)))
        return list(
            itertools.accumulate(
                [net.maxpool(stem), net.layer1, net.layer2, net.layer3, net.layer4], lambda f, layer: layer(f)
            )
        )[1:]
    features = []
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            features.append(x.clone())
            x = nn.functional.max_pool2d(x, layer.kernel_size, layer.stride, int(backbone == "alexnet"))
        elif backbone == "alexnet" and x.shape[1] == 3:
            x = nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, padding=5)
        else:
            x = layer(x)
    return features


@pytest.mark.parametrize("backbone", TRANSFERRED)
def test_a_grey_image_gives_the_features_torchvision_gives_of_it_in_rgb(backbone: str, files: Path) -> None:
    encoder = Encoder(backbone, 2, pretrained=weight_file(backbone, files), max_stride=32).eval()
    image = images((96, 64))
    grey = image
    if backbone == "vgg16":  # which sees the average of 2 x 2 pixels
        grey = image.view(1, 1, 48, 2, 32, 2).mean((3, 5))
    rgb = ((grey - IMAGENET_MEAN) / IMAGENET_STD).expand(-1, 3, -1, -1)
    with torch.no_grad():
        ours, expected = encoder(image), torchvision_features(backbone, rgb)
    assert len(ours) - len(expected) == (backbone == "resnet18")  # its stem is checked through what follows
    for a, b in zip(ours[-len(expected) :], expected, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("dims", [2, 3])
def test_the_plain_encoder_is_symnets_way_down_for_one_image(dims: int) -> None:
    encoder, symnet = Encoder("plain", dims), SymNet(dims)
    ours = list(encoder.parameters())
    theirs: list[Tensor] = [*symnet.down.parameters(), *symnet.bottom.parameters()]
    theirs[0] = theirs[0][:, :1]  # which sees two images; the first of them here
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for mine, its in zip(ours, theirs, strict=True):
            its.normal_(std=0.1)
            mine.copy_(its)
        grey = images(SIZES[dims][0])
        x = (grey - IMAGENET_MEAN) / IMAGENET_STD
        x = torch.cat([x, torch.zeros_like(x)], 1)
        expected = []
        for block in [*symnet.down, symnet.bottom]:
            x = block(x)
            expected.append(x)
        for a, b in zip(encoder(grey), expected[1:], strict=True):  # the finest stays inside
            assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_a_volume_constant_along_the_new_axis_gives_the_2d_features_in_its_middle(backbone: str, files: Path) -> None:
    flat, deep = (Encoder(backbone, d, pretrained=weight_file(backbone, files), max_stride=4).eval() for d in (2, 3))
    if backbone == "alexnet":
        flat, deep = (
            Encoder(backbone, d, pretrained=weight_file(backbone, files), max_stride=8).eval() for d in (2, 3)
        )
    image = images((19, 24))
    with torch.no_grad():  # the second stages look 21 (resnet18), 14 (vgg16), 25 (alexnet), 11 (plain) voxels around
        planes, volumes = flat(image), deep(image.unsqueeze(-1).expand(-1, -1, -1, -1, 65))
    for plane, volume, stride in zip(planes, volumes, flat.strides, strict=True):
        middle = volume[..., 32 // stride]
        assert torch.allclose(middle, plane, atol=1e-4 * plane.abs().max().item())


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_features_look_at_the_image_around_their_own_voxel(backbone: str, files: Path) -> None:
    encoder = Encoder(backbone, 2, pretrained=weight_file(backbone, files)).eval()
    n = 257
    probes = torch.zeros(n, 1, n, 1)  # image p has a NaN at voxel p: whichever feature sees it turns NaN
    probes[torch.arange(n), 0, torch.arange(n)] = torch.nan
    with torch.no_grad():
        features = encoder(probes)
    for feature, stride in zip(features, encoder.strides, strict=True):
        middle = 128 // stride
        seen = feature[:, 0, middle, 0].isnan().nonzero().flatten()
        assert seen[0] > 0 and seen[-1] < n - 1  # the whole field of view is in the image
        # windows of 2 x 2 begin at that voxel; the others lie around it
        late = (stride - 1) / 2 if backbone in ("vgg16", "pooled") else 0
        assert (seen[0] + seen[-1]) / 2 == 128 + late


@pytest.mark.parametrize("dims", [2, 3])
def test_pooled_features_are_the_images_own_averages(dims: int) -> None:
    image = images((32, 48, 16)[:dims])
    white = (image - IMAGENET_MEAN) / IMAGENET_STD
    for feature, stride in zip(Encoder("pooled", dims)(image), (2, 4, 8, 16), strict=True):
        cells = [part for n in white.shape[2:] for part in (n // stride, stride)]
        means = white.reshape(1, 1, *cells).mean([3 + 2 * axis for axis in range(dims)])
        assert torch.allclose(feature, means, atol=1e-5)


@pytest.mark.parametrize(("given", "strides"), [(8, (2, 4, 8)), (4, (2, 4)), (15, (2, 4, 8)), (None, (2, 4, 8, 16))])
def test_stages_are_cut_off_where_told_and_a_trained_network_says_how_many_it_has(
    given: int | None, strides: tuple[int, ...], tmp_path: Path
) -> None:
    net = SymmetricNet(2, "vgg16", max_stride=given)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    again, deep = (
        SymmetricNet(dims, "vgg16", pretrained=str(tmp_path / "model.pt"), transfer="encoder") for dims in (2, 3)
    )
    assert net.encoder.strides == again.encoder.strides == deep.encoder.strides == strides
    assert net.max_stride == strides[-1]
    again.load_state_dict(net.state_dict())
    if given == 4:
        with pytest.raises(InputError, match="--max_stride 8: those weights end at stride 4"):
            SymmetricNet(2, "vgg16", pretrained=str(tmp_path / "model.pt"), max_stride=8)
    flat = SymmetricNet(2, "pooled", max_stride=given)  # whose stages have no tensors
    torch.save(flat.state_dict(), tmp_path / "flat.pt")
    SymmetricNet(2, "pooled", pretrained=str(tmp_path / "flat.pt"), transfer="encoder").load_state_dict(
        flat.state_dict()
    )


def test_wrong_choices_are_refused_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="resnet50.*resnet18, vgg16, alexnet"):
        Encoder("resnet50", 2)
    with pytest.raises(ValueError, match="spatial_dims is 4"):
        Encoder("resnet18", 4)
    with pytest.raises(ValueError, match="alexnet has 3 stages"):
        Encoder("alexnet", 2, freeze=4)
    with pytest.raises(ValueError, match="max_stride 2: alexnet's finest stage has stride 4"):
        Encoder("alexnet", 2, max_stride=2)
    with pytest.raises(InputError, match="max_stride eight: give a whole number, 4 to 16"):
        Encoder("alexnet", 2, max_stride="eight")  # type: ignore[arg-type]  # as a command line may give it


@pytest.mark.parametrize("backbone", TRANSFERRED)
def test_the_layers_have_torchvisions_names_and_shapes(backbone: str) -> None:
    with torch.device("meta"):
        ours, theirs = BACKBONES[backbone].build().state_dict(), torchvision.models.get_model(backbone).state_dict()
    classifiers = {name for name in theirs if name.split(".")[0] in ("fc", "classifier")}
    shapes = [(name, tensor.shape) for name, tensor in theirs.items() if name not in classifiers]
    assert [(name, tensor.shape) for name, tensor in ours.items()] == shapes

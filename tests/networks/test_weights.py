"""Small files that the tests make go through the very code that reads ImageNet's and MedicalNet's."""

from __future__ import annotations

import os
import pickle
import sys
import types
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from regpipe.io.images import InputError
from regpipe.networks.encoders import Encoder
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.symnet import load_symnet
from regpipe.networks.weights import inflate, lay_in_decoder, read_state_dict, read_weights

State = dict[str, Tensor]
STEM = "stages.0.0.weight"


@pytest.fixture(scope="module")
def resnet() -> State:
    """torchvision's names and shapes, random values."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    return {k: v + 0.1 * torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache, and no network."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known\nsecond line")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub" / "checkpoints"


def test_a_grey_network_shared_out_among_channels_sees_alike_ones_as_it_saw_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grey = SymmetricNet(2, "resnet18").eval()
    for name, weight in grey.named_parameters():
        if "flow" in name:
            nn.init.normal_(weight, std=0.1)
    torch.save(grey.state_dict(), tmp_path / "grey.pt")
    again = SymmetricNet(2, "resnet18", pretrained=str(tmp_path / "grey.pt")).eval().double()
    assert again.image_channels == 1
    pair = torch.rand(1, 2, 40, 33).double()
    with torch.no_grad():
        for many in (2, 3):
            net = SymmetricNet(2, "resnet18", image_channels=many, pretrained=str(tmp_path / "grey.pt")).eval().double()
            torch.testing.assert_close(net(pair.repeat_interleave(many, 1)), again(pair), rtol=0, atol=1e-5)
    torch.save(net.state_dict(), tmp_path / "three.pt")
    assert SymmetricNet(2, "resnet18", pretrained=str(tmp_path / "three.pt")).image_channels == 3


def test_what_tells_structures_apart_is_shared_out_among_channels_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grey = SymmetricNet(2, "resnet18", structures=2).eval()
    torch.save(grey.state_dict(), tmp_path / "grey.pt")
    told: dict[str, Any] = {"pretrained": str(tmp_path / "grey.pt"), "transfer": "network"}
    net = SymmetricNet(2, "resnet18", structures=2, image_channels=2, **told).eval()
    images = torch.rand(1, 1, 48, 32)
    with torch.no_grad():
        found, expected = (
            one.get_submodule("anatomy")(images.repeat_interleave(many, 1)) for one, many in ((net, 2), (grey, 1))
        )
    assert expected.std() > 0
    torch.testing.assert_close(found, expected)


def test_three_channels_keep_the_weights_of_the_colours(resnet: State, tmp_path: Path) -> None:
    torch.save(resnet, tmp_path / "resnet.pth")
    stems = [
        Encoder("resnet18", dim, pretrained=str(tmp_path / "resnet.pth"), image_channels=many).state_dict()[STEM]
        for dim, many in ((2, 3), (2, 2), (3, 3))
    ]
    colours = resnet["conv1.weight"]
    assert torch.equal(stems[0], colours)
    torch.testing.assert_close(stems[1], colours.sum(1, keepdim=True).repeat(1, 2, 1, 1) / 2)
    torch.testing.assert_close(stems[2].sum(-1), colours)


def cached_name(backbone: str) -> str:
    return torchvision.models.get_model_weights(backbone).DEFAULT.url.rsplit("/", 1)[-1]


def saved(state: object, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return str(path)


def test_none_reads_nothing() -> None:
    assert read_weights("none", "resnet18", 2) is None


@pytest.mark.parametrize("dims", [2, 3])
def test_imagenet_weights_come_from_torchvisions_cache(dims: int, hub: Path, resnet: State) -> None:
    saved(resnet, hub / cached_name("resnet18"))
    own = Encoder("resnet18", dims, pretrained="imagenet").state_dict()
    theirs = {
        "0.0": "conv1",
        "0.1": "bn1",
        "1.1.0.conv2": "layer1.0.conv2",
        "2.0.downsample.0": "layer2.0.downsample.0",
    }
    for ours, name in theirs.items():
        weight, expected = own[f"stages.{ours}.weight"], resnet[f"{name}.weight"]
        if name == "conv1":
            expected = expected.sum(1, keepdim=True)  # grey: R = G = B
        # a 3D kernel's responses to what is constant along the new axis are the 2D kernel's
        assert torch.allclose(weight.sum(-1) if weight.ndim == 5 else weight, expected, atol=1e-6)
    for statistic in ("running_mean", "running_var"):
        assert torch.equal(own[f"stages.0.1.{statistic}"], resnet[f"bn1.{statistic}"])


def features_of(backbone: str) -> State:
    """Random values for VGG16's or AlexNet's feature layers, in torchvision's names."""
    with torch.device("meta"):
        layers = torchvision.models.get_model(backbone).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    return {f"features.{name}": torch.randn(v.shape, generator=generator) * 0.01 for name, v in layers.items()}


@pytest.mark.parametrize(
    ("backbone", "theirs", "ours"), [("vgg16", "features.7", "1.3"), ("alexnet", "features.3", "1.1")]
)
def test_the_others_weights_come_from_there_too(backbone: str, theirs: str, ours: str, hub: Path) -> None:
    state = features_of(backbone)
    saved(state, hub / cached_name(backbone))
    own = Encoder(backbone, 2, pretrained="imagenet").state_dict()
    for leaf in ("weight", "bias"):
        assert torch.equal(own[f"stages.{ours}.{leaf}"], state[f"{theirs}.{leaf}"])


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16", "alexnet"])
def test_without_network_or_file_the_error_names_the_file_and_its_folder(backbone: str, hub: Path) -> None:
    with pytest.raises(InputError) as error:
        Encoder(backbone, 2, pretrained="imagenet")
    assert "\n" not in str(error.value)
    assert str(hub / cached_name(backbone)) in str(error.value) and "service not known" in str(error.value)


def medicalnet(resnet: State) -> dict[str, State]:
    """As published: 3D, one grey channel, DataParallel's prefix, wrapped, shortcuts without weights."""
    state = {k: inflate(v, v.shape[-1]) if v.ndim == 4 else v for k, v in resnet.items()}
    state["conv1.weight"] = state["conv1.weight"].sum(1, keepdim=True)
    return {"state_dict": {f"module.{k}": v for k, v in state.items() if "downsample" not in k and "fc" not in k}}


@pytest.mark.parametrize("dims", [2, 3])
def test_medicalnet_weights_come_through_its_hub_and_its_shortcuts_pass_on(
    dims: int, resnet: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []

    def download(**what: str) -> str:
        asked.append(what)
        return path

    hub = types.ModuleType("huggingface_hub")
    path = saved(medicalnet(resnet), tmp_path / "resnet_18_23dataset.pth")
    monkeypatch.setattr(hub, "hf_hub_download", download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    got = Encoder("resnet18", dims, pretrained="medicalnet").state_dict()
    same = Encoder("resnet18", dims, pretrained=path).state_dict()  # the file given by hand
    assert asked == [{"repo_id": "TencentMedicalNet/MedicalNet-Resnet18", "filename": "resnet_18_23dataset.pth"}]
    shortcut = got["stages.2.0.downsample.0.weight"].flatten(1)  # 64 channels to 128: its own have no weights
    assert torch.equal(shortcut, torch.eye(128, 64))
    expected = resnet["layer1.0.conv1.weight"]
    for state in (got, same):
        weight = state["stages.1.1.0.conv1.weight"]
        assert torch.allclose(weight.sum(-1) if dims == 3 else weight, expected, atol=1e-6)


def test_medicalnet_without_its_hub_or_for_another_backbone_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if not installed
    with pytest.raises(InputError, match=r"resnet_18_23dataset\.pth.*--pretrained"):
        read_weights("medicalnet", "resnet18", 2)
    with pytest.raises(InputError, match="no alexnet"):
        read_weights("medicalnet", "alexnet", 2)


@pytest.mark.parametrize(("trained", "wanted"), [(2, 2), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_network_trained_here_gives_its_encoder_to_the_next(
    trained: int, wanted: int, batch_norm: bool, tmp_path: Path, resnet: State
) -> None:
    source = saved(resnet, tmp_path / "resnet.pth") if batch_norm else "none"
    before = SymmetricNet(trained, "resnet18", pretrained=source)
    saved(before.state_dict(), tmp_path / "bundle" / "models" / "model.pt")
    after = SymmetricNet(wanted, "resnet18", pretrained=str(tmp_path / "bundle"), transfer="encoder")
    theirs, ours = before.encoder.state_dict(), after.encoder.state_dict()
    assert theirs.keys() == ours.keys()  # BatchNorm stays BatchNorm, GroupNorm GroupNorm
    for name, weight in ours.items():
        a, b = (w.sum(-1) if w.ndim == 5 and trained != wanted else w for w in (weight, theirs[name]))
        assert torch.allclose(a, b, atol=1e-5), name


def test_plain_has_no_published_weights(hub: Path) -> None:
    for source in ("imagenet", "medicalnet"):
        with pytest.raises(InputError, match=f"{source} has no plain.*--pretrained"):
            Encoder("plain", 2, pretrained=source)


def loud_network(dims: int, backbone: str = "resnet18") -> SymmetricNet:
    """With flow weights large enough that two networks' velocities differ."""
    net = SymmetricNet(dims, backbone)
    for name, weight in net.named_parameters():
        if "flow" in name:
            weight.data *= 100
    return net


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("backbone", ["resnet18", "alexnet", "plain"])
def test_a_whole_network_transferred_gives_the_same_velocity_and_trains_on(
    dims: int, backbone: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    before = loud_network(dims, backbone)
    file = saved(before.state_dict(), tmp_path / "model.pt")
    pair = torch.rand(1, 2, *(24,) * dims)
    after = SymmetricNet(dims, backbone, pretrained=file, freeze=2, transfer="encoder")
    assert not torch.allclose(after(pair), before(pair), rtol=0.1)  # its encoder only
    assert lay_in_decoder(after, file, backbone) == []
    assert torch.equal(after(pair), before(pair))
    unasked = SymmetricNet(dims, backbone, pretrained=file)  # nothing is left random in silence
    assert unasked.transfer == "network" and torch.equal(unasked(pair), before(pair))
    trained = {n for n, p in after.named_parameters() if p.requires_grad}
    frozen = {n for n, _ in after.named_parameters() if n.startswith(("encoder.stages.0.", "encoder.stages.1."))}
    assert frozen and trained == {n for n, _ in after.named_parameters()} - frozen
    after(pair).square().sum().backward()
    assert all((p.grad is None) == (n in frozen) for n, p in after.named_parameters())


@pytest.mark.parametrize(("trained", "wanted"), [(2, 3), (3, 2)])
def test_a_decoder_does_not_change_its_dimension_while_an_encoder_does(
    trained: int, wanted: int, tmp_path: Path
) -> None:
    file = saved(SymmetricNet(trained, "alexnet").state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=rf"not {wanted}D.*--transfer encoder"):
        SymmetricNet(wanted, "alexnet", pretrained=file)
    after = SymmetricNet(wanted, "alexnet", pretrained=file, transfer="encoder")
    untouched = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    with pytest.raises(InputError, match=rf"model\.pt.*not {wanted}D.*--transfer encoder"):
        lay_in_decoder(after, file, "alexnet")
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in after.state_dict().items())


def test_parts_of_a_decoder_that_do_not_fit_are_named_and_start_anew(tmp_path: Path) -> None:
    before, after = loud_network(2), SymmetricNet(2, "resnet18", correlation=2)
    file = saved(before.state_dict(), tmp_path / "model.pt")
    untouched = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    left = lay_in_decoder(after, file, "resnet18")
    assert left == [f"levels.{i}.head.0.weight" for i in range(len(after.levels))]  # they see 25 offsets, not 9
    for name, tensor in after.state_dict().items():
        if not name.startswith("encoder."):
            assert torch.equal(tensor, (untouched if name in left else before.state_dict())[name]), name


@pytest.mark.parametrize("source", ["none", "resnet.pth"])
def test_a_file_without_a_decoder_is_refused(source: str, tmp_path: Path, resnet: State) -> None:
    given = source if source == "none" else saved(resnet, tmp_path / source)
    with pytest.raises(InputError, match=f"{source}.*no decoder.*--transfer encoder"):
        lay_in_decoder(SymmetricNet(2, "resnet18"), given, "resnet18")


def test_a_checkpoint_wrapped_by_a_trainer_reads_like_its_state_dict(tmp_path: Path, resnet: State) -> None:
    wrapped = read_state_dict(saved({"network": resnet, "optimizer": {"lr": 1}}, tmp_path / "checkpoint.pt"))
    assert wrapped.keys() == resnet.keys()


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def broken_files(folder: Path) -> dict[str, Path]:
    whole = Path(saved({"conv1.weight": torch.rand(500)}, folder / "whole.pth")).read_bytes()
    (folder / "empty.pth").touch()
    (folder / "truncated.pth").write_bytes(whole[:-400])
    (folder / "page.pth").write_text("<html>log in first</html>\n")
    (folder / "pickled.pth").write_bytes(pickle.dumps(Attack(folder / "executed"), protocol=2))
    saved({"conv1.weight": Attack(folder / "executed")}, folder / "attack.pth")
    saved(nn.Linear(2, 2), folder / "module.pth")
    saved([torch.rand(3)], folder / "list.pth")
    saved({}, folder / "nothing.pth")
    saved({"epoch": 3}, folder / "numbers.pth")
    saved({3: torch.rand(3)}, folder / "numbered.pth")
    saved(features_of("alexnet"), folder / "alexnet.pth")
    saved({f"encoder.{k}": v for k, v in Encoder("alexnet", 2).state_dict().items()}, folder / "alexnet_model.pt")
    return {path.name: path for path in folder.glob("*.p*") if path.name != "whole.pth"} | {"gone": folder / "gone.pth"}


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16"])
def test_whatever_is_wrong_with_a_file_one_line_names_it_and_nothing_in_it_runs(backbone: str, tmp_path: Path) -> None:
    files = broken_files(tmp_path)
    assert len(files) == 13
    for path in files.values():
        for read in (lambda p: Encoder(backbone, 3, pretrained=p), load_symnet):
            with pytest.raises(InputError) as error:
                read(str(path))
            message = str(error.value)
            assert str(path) in message and "\n" not in message and "weights_only" not in message
    assert not (tmp_path / "executed").exists()


def test_a_damaged_file_in_torchvisions_cache_is_named(hub: Path, resnet: State) -> None:
    path = hub / cached_name("resnet18")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>proxy</html>")
    with pytest.raises(InputError) as error:
        Encoder("resnet18", 2, pretrained="imagenet")
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "weights_only" not in str(error.value)

"""Symmetry to the bit, any size, tracing; and SYMNet against what its authors' own code computes."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision
from monai.networks import blocks
from torch import Tensor

from helpers.places import DATA
from regpipe.fields import algebra
from regpipe.fields.algebra import Layers, register, register_midway, resize_image
from regpipe.networks import symmetric
from regpipe.networks.encoders import BACKBONES
from regpipe.networks.symmetric import Prediction, SymmetricNet, fold, joined, local_correlations, parted, unfold
from regpipe.networks.symnet import SymNet, load_symnet

SIZES: dict[int, list[tuple[int, ...]]] = {
    2: [(40, 33), (37, 50), (9, 5), (1, 2)],
    3: [(20, 17, 13), (33, 18, 15), (5, 3, 2)],
}
EVERY = pytest.mark.parametrize(("backbone", "dims"), list(itertools.product(BACKBONES, (2, 3))))


@functools.cache
def built(backbone: str, dims: int) -> SymmetricNet:
    """A network for evaluation, with heads large enough that its velocities are some voxels."""
    torch.manual_seed(0)
    net = SymmetricNet(dims, backbone, width=16).eval()
    for name, weight in net.named_parameters():
        if "flow" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return net


def pair(size: tuple[int, ...], seed: int = 0, batch: int = 1) -> Tensor:
    """Two smooth random images: noise on a grid eight times coarser."""
    generator = torch.Generator().manual_seed(seed)
    return resize_image(torch.rand(batch, 2, *[n // 8 + 2 for n in size], generator=generator), size)


@EVERY
def test_swapping_the_images_flips_the_velocity_to_the_bit(backbone: str, dims: int) -> None:
    net = built(backbone, dims)
    for size in SIZES[dims]:
        both = pair(size)
        with torch.no_grad():
            v, w = net(both), net(both.flip(1))
            there, back = register(both[:, :1], both[:, 1:], v), register(both[:, 1:], both[:, :1], w)
        assert (
            v.isfinite().all()
            and v.abs().max() > (0.2 if size == SIZES[dims][0] else 1e-3)
            and v.shape[:2] == (1, dims)
        )
        assert torch.equal(v, -w)
        assert torch.equal(there.displacement, back.inverse) and torch.equal(there.inverse, back.displacement)
        assert torch.equal(there.warped_moving, back.warped_fixed)
        assert torch.equal(there.warped_fixed, back.warped_moving)


@EVERY
def test_of_several_channels_swapping_the_sides_flips_the_velocity_to_the_bit(backbone: str, dims: int) -> None:
    torch.manual_seed(0)
    net = SymmetricNet(dims, backbone, width=16, image_channels=3, structures=1).eval()
    fixed, moving = torch.rand(2, 1, 3, *SIZES[dims][0])
    with torch.no_grad():
        there, back = (net(torch.cat(sides, 1)) for sides in ((fixed, moving), (moving, fixed)))
    assert torch.equal(there.velocity, -back.velocity) and there.velocity.abs().max() > 0
    assert torch.equal(there.structures, back.structures.roll(2, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_levels_warp_and_integrate_by_the_layers_that_are_given(dims: int) -> None:
    net, both = built("plain", dims), pair(SIZES[dims][0])
    velocities = []
    for dvf2ddf in (blocks.DVF2DDF(7, padding_mode="border"), torch.zeros_like):
        other = SymmetricNet(dims, "plain", width=16, layers=Layers(blocks.Warp(), dvf2ddf)).eval()
        other.load_state_dict(net.state_dict())
        with torch.no_grad():
            velocities.append(other(both) - net(both))
    assert velocities[0].abs().max() < 1e-4 < 0.01 < velocities[1].abs().max()


@EVERY
def test_an_image_is_registered_to_itself_by_standing_still(backbone: str, dims: int) -> None:
    same = pair(SIZES[dims][0])[:, :1].repeat(1, 2, *[1] * dims)
    with torch.no_grad():
        assert torch.equal(built(backbone, dims)(same), torch.zeros(()).expand_as(built(backbone, dims)(same)))


@EVERY
def test_the_velocity_lives_at_half_resolution_with_corners_on_the_images_corners(backbone: str, dims: int) -> None:
    net = built(backbone, dims)
    size = (33, 49, 17)[:dims]  # 16 k + 1: nothing is resampled, and every second voxel carries a vector
    seen: list[tuple[int, ...]] = []
    hooks = [level.register_forward_hook(lambda _, a, out: seen.append(tuple(out.shape[2:]))) for level in net.levels]
    with torch.no_grad():
        v = net(pair(size))
    for hook in hooks:
        hook.remove()
    assert seen == [tuple((n - 1) // stride + 1 for n in size) for stride in net.strides]
    assert net.strides[-1] == 2 and tuple(v.shape[2:]) == seen[-1]
    with torch.no_grad():  # any other size goes to the next such grid, corner on corner
        odd = pair(tuple(n - 3 for n in size))
        assert torch.allclose(net(odd), net(resize_image(odd, size)), atol=1e-6)


@EVERY
def test_gradients_reach_every_weight(backbone: str, dims: int) -> None:
    net = copy.deepcopy(built(backbone, dims)).train()
    both = pair(SIZES[dims][0], batch=2)
    register(both[:, :1], both[:, 1:], net(both)).warped_moving.square().mean().backward()
    unreached = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unreached


@pytest.mark.parametrize(("backbone", "dims"), [("resnet18", 2), ("vgg16", 2), ("alexnet", 3)])
def test_large_images_are_looked_at_one_by_one_with_the_same_velocity_and_gradient(backbone, dims, monkeypatch) -> None:
    torch.manual_seed(0)
    net, pair = SymmetricNet(dims, backbone, structures=1), torch.rand(2, 2, *[20] * dims)

    def found() -> list[Tensor]:
        net.zero_grad()
        velocity, _, structures = net(pair)
        assert structures is not None
        output = joined(velocity, structures)
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    batches: list[int] = []
    net.detail.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    small = found()
    monkeypatch.setattr(symmetric, "SMALL_IMAGE", 0)
    monkeypatch.setattr(symmetric, "SMALL_LEVEL", 0)
    large = found()
    assert batches == [4, 2, 2]
    most = max(float(x.abs().max()) for x in small[1:])
    for one, other in zip(small, large, strict=True):  # a bias before a norm has no gradient but rounding
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(float(one.abs().max()), 1e-2 * most))
    assert torch.equal(net(pair.flip(1))[0], -net(pair)[0])  # the velocities


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize(
    ("backbone", "dims"),
    [
        pytest.param(name, dim, marks=[pytest.mark.slow] if dim == 3 and name != "alexnet" else [])
        for name, dim in itertools.product(BACKBONES, (2, 3))
    ],
)
def test_a_traced_network_gives_the_same_and_other_shapes_are_undisturbed(
    backbone: str, dims: int, tmp_path: Path
) -> None:
    net, size = built(backbone, dims), SIZES[dims][0]
    with torch.no_grad():
        expected, other = net(pair(size, 1)), net(pair(SIZES[dims][1]))
        traced = torch.jit.trace(net, pair(size), check_trace=False)  # held to other images below
        torch.jit.save(traced, tmp_path / "net.ts")
        again = torch.jit.load(tmp_path / "net.ts")
        assert isinstance(expected, Tensor)
        assert torch.allclose(again(pair(size, 1)), expected, atol=1e-5)
        assert torch.equal(net(pair(size, 1)), expected) and torch.equal(net(pair(SIZES[dims][1])), other)


def test_a_saved_state_gives_the_same_network_and_batches_do_not_mix(tmp_path: Path) -> None:
    net = built("resnet18", 2)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    other = SymmetricNet(2, "resnet18", width=16).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    batch = pair((40, 33), batch=2)
    with torch.no_grad():
        assert torch.equal(net(batch), other(batch))
        assert torch.allclose(net(batch)[1:], net(batch[1:]), atol=1e-5)


@EVERY
def test_large_images_are_seen_one_after_the_other_to_the_same_end(
    backbone: str, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, both = built(backbone, dims), pair(SIZES[dims][0])
    with torch.no_grad():
        together = net(both)
        monkeypatch.setattr(symmetric, "SMALL_IMAGE", 0)
        monkeypatch.setattr(symmetric, "SMALL_LEVEL", 0)
        apart, swapped = net(both), net(both.flip(1))
    assert torch.equal(apart, -swapped)
    assert torch.allclose(apart, together, atol=1e-5)


@pytest.mark.parametrize("freeze", [0, 2])
def test_transferred_and_frozen_weights_keep_the_symmetry_in_training(freeze: int, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    net = SymmetricNet(2, "resnet18", pretrained=str(tmp_path / "resnet18.pth"), freeze=freeze, correlation=0)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    both = pair((40, 33))
    (net(both) - 1).square().mean().backward()
    optimiser.step()
    assert torch.equal(net(both), -net(both.flip(1)))
    stem = net.get_parameter("encoder.stages.0.0.weight").grad
    assert (stem is None) == bool(freeze)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_correlation_is_that_of_shifted_features(dims: int) -> None:
    a, b = torch.rand(2, 1, 5, *(6, 7, 4)[:dims], generator=torch.Generator().manual_seed(0))
    offsets = list(itertools.product(range(-1, 2), repeat=dims))
    ahead, back = local_correlations(a, b, offsets)
    for got, first, second in ((ahead, a, b), (list(back), b, a)):
        assert len(got) == 3**dims
        for part, offset in zip(got, offsets, strict=True):
            shifted = second.roll([-o for o in offset], dims=list(range(2, 2 + dims)))  # second(x + o)
            inside: tuple[int | slice, ...] = (0, 0, *[slice(1, -1)] * dims)
            assert torch.allclose(part[inside], (first * shifted).mean(1, keepdim=True)[inside], atol=1e-6)
        assert got[0].flatten()[0] == 0 and got[-1].flatten()[-1] == 0  # beyond the rim there is nothing


def test_an_unknown_backbone_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="resnet18, vgg16, alexnet"):
        SymmetricNet(2, "resnet")


@pytest.mark.parametrize("size", [(32, 48), (37, 21), (17, 16, 23), (16, 16, 16)])
def test_symnet_takes_any_size_in_2d_and_3d_and_is_bounded(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net, both = SymNet(len(size), start_channels=4, limit=3.0).eval(), pair(size)
    with torch.no_grad():
        velocity, back, _ = net(both)
        got = register_midway(both[:, :1], both[:, 1:], velocity, back)
    assert velocity.shape == back.shape == (1, len(size), *size) and max(velocity.abs().max(), back.abs().max()) < 3
    assert got.displacement.shape == (1, len(size), *size) and got.warped_moving.isfinite().all()


Reference = dict[str, np.ndarray]
Authors = tuple[Tensor, Prediction, Reference]
Block = tuple[slice, slice, slice]


@pytest.fixture(scope="module")
def authors() -> Authors:
    """The authors' pair (A, B), our velocities by their weights, and what their own code computed."""
    folder = DATA / "symnet"
    if not folder.is_dir():
        pytest.skip(f"no SYMNet weights and images in {folder} (set REGPIPE_DATA)")
    images = []
    for name in "AB":
        image = np.asarray(nib.load(folder / f"image_{name}.nii.gz").dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        images.append(torch.from_numpy((image - image.min()) / (image.max() - image.min())))
    both = torch.stack(images)[None]
    with torch.no_grad(), np.load(folder / "reference.npz") as reference:
        return both, load_symnet(str(folder / "symnet_oasis.pth")).eval()(both), dict(reference)


def registration_errors(authors: Authors, block: Block, margin: int) -> dict[str, float]:
    """Largest difference by field, A fixed and B moving, in ``block`` without its outer ``margin``: multiples of 4."""
    (both, (velocity, back, _), theirs), place = authors, (slice(None), slice(None), *block)
    assert back is not None
    ours = register_midway(both[place][:, :1], both[place][:, 1:], velocity[place], back[place])
    names = {"displacement_B_to_A": ours.displacement, "displacement_A_to_B": ours.inverse}
    names |= {"warped_B": ours.warped_moving, "warped_A": ours.warped_fixed}
    seen = {name: theirs[name][(slice(None), *(slice(s.start // 4, s.stop // 4) for s in block))] for name in names}
    assert np.abs(seen["displacement_B_to_A"]).max() > 1  # there is something to reproduce
    inner = (slice(None), *[slice(margin // 4, -margin // 4)] * 3)
    return {k: np.abs(u[0, :, ::4, ::4, ::4].numpy() - seen[k])[inner].max() for k, u in names.items()}


@pytest.mark.slow  # two whole heads through their network
def test_symnet_reproduces_its_authors_velocities(authors: Authors) -> None:
    for name, ours in (("velocity_AB", authors[1].back), ("velocity_BA", authors[1].velocity)):
        assert ours is not None and np.abs(ours[0, :, ::4, ::4, ::4].numpy() - authors[2][name]).max() < 1e-3  # voxels


@pytest.mark.slow
def test_symnet_reproduces_its_authors_registration_in_the_middle(
    authors: tuple[Tensor, Prediction, Reference],
) -> None:
    # nothing moves by the 16 voxels that the block is cut short by, so the rest is as in the whole volume
    errors = registration_errors(authors, (slice(32, 128), slice(32, 160), slice(48, 176)), 16)
    assert max(errors.values()) < 1e-3, errors  # voxels; of intensity for the images


@pytest.mark.slow  # 25 s and more of warping on one thread
def test_symnet_reproduces_its_authors_registration(authors: Authors) -> None:
    # 8 voxels in: their sampler pads with zeros
    errors = registration_errors(authors, (slice(0, 160), slice(0, 192), slice(0, 224)), 8)
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("shape", [(9, 17), (5, 9, 3)])
def test_folding_loses_nothing_and_keeps_cells_together(shape) -> None:
    x = torch.rand(2, 3, *shape)
    folded = fold(x)
    assert folded.shape == (2, 3 * 2 ** len(shape), *((n + 1) // 2 for n in shape))
    assert torch.equal(unfold(folded), x)
    cell = x[:, :, :2, :2] if len(shape) == 2 else x[:, :, :2, :2, :2]
    assert torch.equal(folded.flatten(2)[:, :, 0], cell.flatten(1))


@pytest.mark.parametrize("shape", [(20, 33), (17, 13, 20)])
def test_structures_follow_the_velocity_at_full_resolution(shape) -> None:
    """Two classes of two images: the right number of channels, swapped with the images, and they learn."""
    torch.manual_seed(0)
    dims = len(shape)
    net = SymmetricNet(dims, "alexnet", width=16, structures=1)
    images = pair(shape)
    output, swapped = net(images), net(images.flip(1))
    anatomy, other = output.structures, swapped.structures
    assert anatomy is not None
    assert anatomy.shape == (1, 4, *(16 * -(-(n - 1) // 16) + 1 for n in shape))
    torch.testing.assert_close(anatomy, torch.cat(other.chunk(2, dim=1)[::-1], 1))
    torch.testing.assert_close(output.velocity, -swapped.velocity)
    again = parted(joined(output.velocity, anatomy))  # as a traced one gives it
    assert torch.equal(again.velocity, output.velocity)
    assert again.structures is not None and torch.equal(again.structures, anatomy)


def test_a_network_that_looks_for_structures_only_sees_what_the_whole_one_sees_and_nothing_else_learns() -> None:
    torch.manual_seed(0)
    net = SymmetricNet(2, "alexnet", width=16, structures=1)
    images = pair((33, 40))
    whole, only = net(images), net(images, structures_only=True)
    assert torch.equal(only.structures, whole.structures)
    assert only.velocity.shape == whole.velocity.shape and not only.velocity.any() and whole.velocity.any()
    only.structures.square().sum().backward()
    assert {name.split(".")[0] for name, weight in net.named_parameters() if weight.grad is not None} == {"anatomy"}


@pytest.mark.parametrize("dim", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_torch_exports_is_the_network_which_goes_on_as_before(dim: int) -> None:
    torch.manual_seed(0)
    net, pair = SymmetricNet(dim, "plain").eval(), torch.rand(1, 2, *[20] * dim)
    algebra._places.cache_clear()  # what is asked for first while it is exported must not be kept
    with torch.no_grad():
        exported = torch.export.export(net, (pair,), strict=False).module()
        torch.testing.assert_close(exported(pair), net(pair))

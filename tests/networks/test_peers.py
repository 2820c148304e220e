"""MONAI's networks as peers: any size, the images in their order, displacements both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regpipe.engines.inferers import RegistrationInferer
from regpipe.fields.algebra import warp
from regpipe.networks.peers import DIVISOR, DisplacementInferer, LocalNet, VoxelMorph, divisible

SIZES = [(20, 27), (12, 16, 21)]


@pytest.mark.parametrize("size", SIZES)
def test_sides_are_continued_to_multiples_and_cut_back(size: tuple[int, ...]) -> None:
    image = torch.arange(float(torch.Size(size).numel())).reshape(1, 1, *size)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    assert torch.equal(divisible(look, image), image)
    assert all(n % DIVISOR == 0 and 0 <= n - m < DIVISOR for n, m in zip(seen[0].shape[2:], size, strict=True))
    assert seen[0].flatten()[-1] == image.flatten()[-1]  # beyond the rim the image goes on


@pytest.mark.parametrize("size", SIZES)
def test_voxelmorph_gives_a_velocity_of_the_images_size(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    velocity = VoxelMorph(len(size))(torch.rand(2, 2, *size))
    assert velocity.shape == (2, len(size), *size)
    assert velocity.abs().max() > 0


def test_voxelmorph_shows_its_network_the_moving_image_first() -> None:
    net = VoxelMorph(2)
    net.unet = torch.nn.Identity()
    fixed, moving = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    assert torch.equal(net(torch.cat([fixed, moving], 1)), torch.cat([moving, fixed], 1))


@pytest.mark.parametrize("size", SIZES)
def test_localnet_begins_at_the_identity(size: tuple[int, ...]) -> None:
    pair = torch.rand(1, 2, *size)
    found = DisplacementInferer()(pair, LocalNet(len(size), channels=4))
    assert not found["displacement"].any() and not found["inverse"].any()
    assert torch.allclose(found["warped_moving"], pair[:, 1:], atol=1e-6)


def test_localnet_swaps_its_displacements_with_its_images() -> None:
    torch.manual_seed(0)
    net = LocalNet(2, channels=4).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pair = torch.rand(1, 2, 16, 20)
    found, swapped = DisplacementInferer()(pair, net), DisplacementInferer()(pair.flip(1), net)
    assert found["displacement"].abs().max() > 0.1
    assert torch.allclose(found["displacement"], swapped["inverse"], atol=1e-5)
    assert torch.equal(found["warped_moving"], warp(pair[:, 1:], found["displacement"]))
    assert torch.equal(found["warped_fixed"], warp(pair[:, :1], found["inverse"]))


def test_both_inferers_give_the_same_names() -> None:
    pair = torch.rand(1, 2, 16, 16)
    ours = RegistrationInferer()(pair, VoxelMorph(2))
    assert DisplacementInferer()(pair, LocalNet(2, channels=4)).keys() == {*ours, "back"}

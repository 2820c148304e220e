"""Feature similarity against torchvision's own layers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from helpers.terms import smooth
from regpipe.losses.similarity import feature_similarity
from regpipe.networks.encoders import Encoder

BACKBONES = ("resnet18", "vgg16", "alexnet")


def test_features_are_compared_as_torchvisions_own_layers_give_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    for name, buffer in net.named_buffers():  # else BatchNorm would hardly do anything
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    encoder = Encoder("resnet18", 2, pretrained=str(tmp_path / "resnet18.pth")).eval()
    a, b = smooth(2, 1, (45, 38)), smooth(2, 1, (45, 38), seed=1)

    def layers(image: Tensor) -> list[Tensor]:
        x = net.relu(net.bn1(net.conv1(((image - 0.449) / 0.226).expand(-1, 3, -1, -1))))
        out = [x]
        for layer in (torch.nn.Sequential(net.maxpool, net.layer1), net.layer2, net.layer3):
            out.append(layer(out[-1]))
        return out

    with torch.no_grad():
        apart = [1 - torch.cosine_similarity(x, y, dim=1) for x, y in zip(layers(a), layers(b), strict=True)]
        assert float(feature_similarity(a, b, encoder)) == pytest.approx(
            np.mean([float(x.mean()) for x in apart]), rel=1e-4
        )
        mask = (smooth(2, 1, (45, 38), seed=2) > 0.4).float()
        expected = 0.0
        for distance, stride in zip(apart, encoder.strides, strict=True):
            seen = mask[:, 0].numpy()[:, ::stride, ::stride]
            expected += float(np.mean([np.average(d, weights=w) for d, w in zip(distance, seen, strict=True)])) / 4
        assert float(feature_similarity(a, b, encoder, mask=mask)) == pytest.approx(expected, rel=1e-4)
        assert float(feature_similarity(a, a, encoder)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("backbone", "shape"), list(itertools.product(BACKBONES, [(33, 30), (17,) * 3])))
def test_features_of_every_backbone_pull_on_the_image_and_not_on_the_weights(backbone, shape) -> None:
    encoder = Encoder(backbone, len(shape)).requires_grad_(False).eval()
    a = smooth(1, 1, shape).requires_grad_()
    mask = torch.zeros(1, 1, *shape)
    mask[(slice(None), slice(None), *[slice(n - 5) for n in shape])] = 1
    feature_similarity(a, smooth(1, 1, shape, seed=1), encoder, mask=mask).backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.any()
    assert all(p.grad is None for p in encoder.parameters())

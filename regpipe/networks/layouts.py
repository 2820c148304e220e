"""The layers of torchvision's ResNet18, VGG16 and AlexNet before their classifiers, by torchvision's names.

Importing torchvision takes a second, which a network whose weights lie in a file need not pay. The tests hold names,
shapes and what comes out to torchvision's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

VGG16 = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512, None)  # None: a pool


class Convolution(nn.Conv2d):
    """One whose numbers are not drawn: ``networks.encoders`` does, after its own manner."""

    def reset_parameters(self) -> None:
        pass


class Features(nn.Module):
    """Layers called ``features``."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)


def vgg16() -> Features:
    """Simonyan & Zisserman 2015."""
    layers: list[nn.Module] = []
    seen = 3
    for width in VGG16:
        if width is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [Convolution(seen, width, 3, padding=1), nn.ReLU(inplace=True)]
            seen = width
    return Features(layers)


def alexnet() -> Features:
    """Krizhevsky 2014."""
    convolutions = [
        Convolution(3, 64, 11, stride=4, padding=2),
        Convolution(64, 192, 5, padding=2),
        Convolution(192, 384, 3, padding=1),
        Convolution(384, 256, 3, padding=1),
        Convolution(256, 256, 3, padding=1),
    ]
    layers: list[nn.Module] = []
    for i, convolution in enumerate(convolutions):
        layers += [convolution, nn.ReLU(inplace=True), *([nn.MaxPool2d(3, 2)] if i in (0, 1, 4) else [])]
    return Features(layers)


class ResNet18(nn.Module):
    """He et al. 2016."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Convolution(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(64, 64), Block(64, 64))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, seen: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Convolution(seen, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Convolution(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        shortcut = nn.Sequential(Convolution(seen, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = shortcut if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        found = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        found += x if self.downsample is None else self.downsample(x)
        return self.relu(found)

"""Random motion and looks of each image of a pair, in training: more poses and scanners than a small cohort has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import identity_grid, resize_image, warp
from regpipe.utils.errors import InputError


class RandomAffine:
    """Loads a case and moves both of its images, labels and landmarks, each by an affine map of its own.

    The map's linear part is the identity plus normal noise of standard deviation ``amount``, its centre is the grid's
    centre, and its translation is normal with ``amount`` times the grid's size. The images continue beyond the rim.
    With ``mirror`` both images of a pair are mirrored, alike, along each of these axes half of the time. Drawn from
    torch's generator, so that a resumed run draws the same. A true displacement no longer holds and is left out.

    Args:
        load: case -> item, ``regpipe.LoadPair``.
        amount: 0 leaves every place as it is; 0.05 is 3 degrees, 5 % of size and 2 voxels of 40, say.
        mirror: axes of the working grid along which the mirrored anatomy could be a patient's, too.

    Raises:
        InputError: an axis is mirrored that the images do not have.
    """

    def __init__(
        self, load: Callable[[Mapping[str, str]], dict[str, Any]], *, amount: float, mirror: Sequence[int] = ()
    ) -> None:
        self.load, self.amount, self.mirror = load, amount, list(mirror)

    def __call__(self, case: Mapping[str, str]) -> dict[str, Any]:
        item = self.load(case)
        if not self.amount and not self.mirror:
            return item
        signs = self._signs(item["fixed_image"].ndim - 1)
        moved = {key: value for key, value in item.items() if key != "displacement"}
        for side in SIDES:
            shape = item[f"{side}_image"].shape[1:]
            matrix, shift = draw_affine(shape, self.amount)
            matrix = matrix * signs
            u = affine_displacement(matrix, shift, shape)
            for kind, mode in (("image", "bilinear"), ("label", "nearest"), ("mask", "nearest")):
                if f"{side}_{kind}" in item:
                    moved[f"{side}_{kind}"] = warp(item[f"{side}_{kind}"][None], u, mode=mode)[0]
            # the image is pulled: what stood at p is seen where x + u(x) = p
            moved[f"{side}_landmarks"] = move_points(item[f"{side}_landmarks"], matrix, shift, shape)
        return moved

    def _signs(self, dim: int) -> Tensor:
        """(D,): -1 for an axis to be mirrored, else 1."""
        if not set(self.mirror) <= set(range(dim)):
            raise InputError(f"--mirror {self.mirror}: the images have the axes 0 to {dim - 1}")
        signs = torch.ones(dim)
        if self.mirror:
            signs[self.mirror] = torch.randint(0, 2, (len(self.mirror),)) * 2.0 - 1
        return signs


class RandomIntensity:
    """Loads a case and changes each of its images' contrast, shading and noise; what lies where stays.

    An image x in [0, 1] becomes ``s x^g + n``, which may leave [0, 1]: ln g is uniform in +-0.7 ``amount``; ln s is
    smooth, normal noise of standard deviation 0.3 ``amount`` on four points an axis; n is white, up to 0.1 ``amount``.
    MONAI's transforms for these have random states of their own, which a resumed run would begin anew; this one draws
    from torch's generator.
    """

    def __init__(self, load: Callable[[Mapping[str, str]], dict[str, Any]], *, amount: float) -> None:
        self.load, self.amount = load, amount

    def __call__(self, case: Mapping[str, str]) -> dict[str, Any]:
        item = self.load(case)
        if not self.amount:
            return item
        return item | {f"{side}_image": change_intensity(item[f"{side}_image"], self.amount) for side in SIDES}


def change_intensity(image: Tensor, amount: float) -> Tensor:
    """An image (1, *S) in [0, 1] with another contrast, shading and noise, see ``RandomIntensity``."""
    exponent = torch.exp(0.7 * amount * (2 * torch.rand(1) - 1))
    coarse = 0.3 * amount * torch.randn(1, 1, *[4] * (image.ndim - 1))
    shading = resize_image(coarse, image.shape[1:])[0].exp()
    noise = 0.1 * amount * torch.rand(1) * torch.randn_like(image)
    return shading * image.clamp(min=0) ** exponent + noise


def draw_affine(shape: torch.Size, amount: float) -> tuple[Tensor, Tensor]:
    """A random linear map (D, D) and translation (D,) in voxels."""
    dim = len(shape)
    return torch.eye(dim) + amount * torch.randn(dim, dim), amount * torch.randn(dim) * torch.tensor(shape)


def affine_displacement(matrix: Tensor, shift: Tensor, shape: torch.Size) -> Tensor:
    """u (1, D, *shape) with ``x + u(x) = c + matrix (x - c) + shift``, c the grid's centre."""
    grid = identity_grid(shape)
    centre = _centre(shape).view(1, -1, *[1] * len(shape))
    moved = torch.einsum("ij,bj...->bi...", matrix, grid - centre)
    return moved + centre + shift.view_as(centre) - grid


def move_points(points: Tensor, matrix: Tensor, shift: Tensor, shape: torch.Size) -> Tensor:
    """Where points (K, D) of an image are seen after it was pulled through ``affine_displacement``."""
    centre = _centre(shape)
    return (points - centre - shift) @ torch.linalg.inv(matrix).T + centre


def _centre(shape: torch.Size) -> Tensor:
    return (torch.tensor(shape) - 1) / 2

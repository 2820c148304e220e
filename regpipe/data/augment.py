"""Random motion, contrast and noise of training images: more poses and scanners than a small cohort has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import identity_grid, resize_image, warp
from regpipe.utils.errors import InputError

IN_SPACE = ("image", "label", "mask", "channels")
MOVING = ("monai.transforms.spatial", "monai.transforms.croppad", "monai.transforms.smooth_field")


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
            for kind in IN_SPACE:
                mode = "nearest" if kind in ("label", "mask") else "bilinear"
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


class MonaiTransforms:
    """Loads a case and gives it to dictionary transforms of MONAI's, after which affines and landmarks are right.

    Images, further channels, labels and masks go in as ``MetaTensor`` with their affine, working voxel -> RAS mm. What
    this says when they come out is their new frame, and landmarks are moved into it. They leave as plain tensors, on
    whatever grid the transforms made, the same for both images; a true displacement is left out where they moved.
    MONAI's transforms have random states of their own, which a resumed run begins anew.

    Args:
        load: case -> item, ``regpipe.LoadPair``.
        transforms: of ``monai.transforms``; what moves an image is given its channels (``fixed_channels``), label and
            mask in ``keys``, too.

    Raises:
        InputError: a transform of which no affine tells what it moved; later, where the parts of a pair were not moved
            together, or the image has a homography.
    """

    def __init__(self, load: Callable[..., dict[str, Any]], transforms: Sequence[Any]) -> None:
        from monai.transforms import Compose, InvertibleTransform

        self.load, self.transform = load, Compose(transforms)
        for part in self.transform.flatten().transforms:
            if _moves(part) and not isinstance(part, InvertibleTransform):
                raise InputError(
                    f"{type(part).__name__}: no affine tells where it moves what, so that landmarks could not follow; "
                    "take an affine transform, RandAffined say, or --augment"
                )

    @property
    def moving(self) -> bool:
        """Whether any of them may change a place."""
        return any(map(_moves, self.transform.flatten().transforms))

    @property
    def names(self) -> list[str]:
        """What the transforms are called."""
        return [type(part).__name__ for part in self.transform.flatten().transforms]

    def __call__(self, case: Mapping[str, str]) -> dict[str, Any]:
        from monai.data import MetaTensor

        item = self.load(case)
        before = {side: item[f"{side}_affine"] for side in SIDES}
        seen = dict(item)
        for side, kind in itertools.product(SIDES, IN_SPACE):
            if f"{side}_{kind}" in item:
                tensor = item[f"{side}_{kind}"].clone()  # what was loaded may be kept
                seen[f"{side}_{kind}"] = MetaTensor(tensor, affine=_four(before[side]))
        moved: dict[str, Any] = self.transform(seen)
        for side in SIDES:
            self._settle(moved, side, before[side])
        if moved["fixed_image"].shape != moved["moving_image"].shape:
            raise InputError(f"{', '.join(self.names)}: both images of a pair must come onto a grid of one shape")
        return moved

    def _settle(self, item: dict[str, Any], side: str, before: Tensor) -> None:
        """Plain tensors again, and the frame and landmarks of one side as its image now says. In place."""
        keys = [f"{side}_{kind}" for kind in IN_SPACE if f"{side}_{kind}" in item]
        frames = [_of_dimension(item[key].affine.double(), len(before) - 1) for key in keys]
        shapes = [item[key].shape[1:] for key in keys]
        apart = [k for k, f, s in zip(keys, frames, shapes, strict=True) if s != shapes[0] or not f.allclose(frames[0])]
        if apart:
            raise InputError(f"{', '.join(self.names)}: {apart[0]} was not moved with {keys[0]}; name both in keys")
        moved = not frames[0].allclose(before)
        if moved and (f"{side}_bend" in item or f"{side}_field" in item):
            raise InputError(
                f"{', '.join(self.names)}: a homography or an initial field does not follow; leave out what moves them"
            )
        for key in keys:
            item[key] = item[key].as_tensor().to(torch.int32 if key.endswith("label") else torch.float32)
        item[f"{side}_affine"] = frames[0]
        if moved:
            item.pop("displacement", None)
            points = item[f"{side}_landmarks"]
            onto = torch.linalg.inv(frames[0]) @ before
            item[f"{side}_landmarks"] = (points.double() @ onto[:-1, :-1].T + onto[:-1, -1]).to(points)


def _moves(transform: Any) -> bool:
    kind = type(transform)
    return kind.__module__.startswith(MOVING) and "Adjust" not in kind.__name__  # smooth fields of grey values


def _four(affine: Tensor) -> Tensor:
    """(D+1, D+1) -> (4, 4), as MONAI has them of slices, too."""
    from monai.data.utils import to_affine_nd

    return to_affine_nd(3, affine)


def _of_dimension(affine: Tensor, dim: int) -> Tensor:
    """``_four`` backwards."""
    kept = [*range(dim), 3]
    return affine[kept][:, kept]


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
        keys = [key for kind in ("image", "channels") for side in SIDES if (key := f"{side}_{kind}") in item]
        return item | {
            key: torch.cat([change_intensity(one, self.amount) for one in item[key].split(1)]) for key in keys
        }


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

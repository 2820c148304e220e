"""Random pairs with known displacements, made in torch during training; the shipped networks are trained on them.

    fixed(x) = scene(x);  moving(y) = scene(phi^-1(y));  u(x) = phi(x) - x
    hence  moving(x + u(x)) = fixed(x)

as in ``phantoms.scenes``, but of no organ and no scanner, and each pair is new. A scene is a function of place: a
texture, and heights, of which the largest is the label. Both images evaluate it, so that no label is resampled. The
scanner's part is drawn for each image independently (SynthMorph, Hoffmann et al., IEEE TMI 2022; anatomix, Dey et al.,
ICLR 2025). All random numbers come from one ``torch.Generator``.

Shapes: images (1, 1, *S), fields (1, D, *S) in voxels, the convention of ``fields.algebra``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Generator, Tensor
from torch.utils.data import Dataset

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import differences, identity_grid, integrate_both, resize, resize_image, sample_at, warp
from regpipe.phantoms.noise import MARGIN, blur, chance, integer, noise_function, normal, smooth_noise, uniform
from regpipe.phantoms.scanner import scan
from regpipe.phantoms.scenes import Phantom
from regpipe.utils.errors import InputError

LARGEST_MOTION = 0.2  # of the image's longest side
STEEPEST = 0.7  # largest difference of a velocity between neighbours: exp(0.7) is twice the length
SAME_CONTRAST = 0.35  # share of the pairs
UNLIKE = 12.0  # largest factor on the bends that an image has of its own; 0.7 of the pairs have some
AIR = 0.5  # share of the scenes that are a body in air
LANDMARKS = 24  # of a pair on disk
SIDE_LENGTHS = {2: (96, 160), 3: (48, 96)}  # of the images in training, voxels
VALIDATED = {2: (128, 128), 3: (64, 64, 64)}  # grids of the pairs held apart
STEP = 16  # between their sides


class Batches(Dataset[dict[str, Any]]):
    """An epoch of batches of random pairs, for a data loader with ``batch_size`` None.

    Each batch has its own grid, with sides from ``SIDE_LENGTHS``, shorter ones more often. Every access gives a new
    batch, drawn from torch's generator, whose state a resumed run restores.

    Args:
        spatial_dims: 2 or 3.
        batches: how many are an epoch.
        batch_size: pairs in each.
        device: where they are made.

    Raises:
        InputError: a number that is not above 0; images that are neither 2D nor 3D.
    """

    clean = True  # its pairs have clean images

    def __init__(self, spatial_dims: int, *, batches: int, batch_size: int = 1, device: Any = "cpu") -> None:
        if spatial_dims not in SIDE_LENGTHS:
            raise InputError(f"spatial_dims is {spatial_dims}: images are 2D or 3D")
        if batches < 1 or batch_size < 1:
            raise InputError(f"{batches} batches of {batch_size} synthetic pairs: give 1 or more; see pairs_per_epoch")
        self.sides, self.batches, self.batch_size = [SIDE_LENGTHS[spatial_dims]] * spatial_dims, batches, batch_size
        self.device, self.same_contrast = torch.device(device), SAME_CONTRAST

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.batches:
            raise IndexError(index)
        shape = [STEP * round(low * (high / low) ** float(torch.rand(1)) ** 2 / STEP) for low, high in self.sides]
        generator = Generator(self.device).manual_seed(int(torch.randint(2**62, (1,))))
        return make_batch(shape, self.batch_size, generator=generator, same_contrast=self.same_contrast)


class LikeFirst:
    """Begins a training with pairs of one contrast; their share falls to ``SAME_CONTRAST`` over ``epochs``.

    A network learns sooner where to look when corresponding places look alike: docs/results/shipped.md.
    """

    def __init__(self, batches: Batches, epochs: int) -> None:
        self.batches, self.epochs = batches, epochs

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        gone = (engine.state.epoch - 1) / self.epochs if self.epochs else 1.0
        self.batches.same_contrast = max(SAME_CONTRAST, 1 - gone)


class Scene(NamedTuple):
    """What is imaged, as functions of place."""

    heights: Callable[[Tensor], Tensor]  # places (1, D, *any) in voxels -> (1, K, *any)
    texture: Callable[[Tensor], Tensor]  # -> (1, 1, *any)
    labels: int
    air: bool  # label 0 is air around a body


def make_batch(
    shape: Sequence[int], size: int, *, generator: Generator, same_contrast: float = SAME_CONTRAST
) -> dict[str, Any]:
    """``size`` pairs on one grid, collated as by ``data.load.collate_pairs``; the same generator gives the same bytes.

    ``{fixed,moving}_{image,label,mask}`` (B, 1, *shape); ``{fixed,moving}_clean``, the same scenes in one contrast and
    without what a scanner adds; ``displacement`` and ``inverse`` (B, D, *shape) in voxels: what warps moving onto
    fixed, and fixed onto moving, but for the fine bends that each image of an ``UNLIKE`` pair has of its own.

    Args:
        shape: 2 or 3 sides in voxels, 16 at least.
        size: how many.
        generator: its device is where they are made.
        same_contrast: share of the pairs whose images have the same contrast.
    """
    pairs = [make_pair(shape, generator=generator, same_contrast=same_contrast) for _ in range(size)]
    batch: dict[str, Any] = {key: torch.cat([pair[key] for pair in pairs]) for key in pairs[0]}
    return {"case": [f"synthetic_{i}" for i in range(size)], **batch}


@torch.no_grad()
def make_pair(shape: Sequence[int], *, generator: Generator, same_contrast: float = SAME_CONTRAST) -> dict[str, Tensor]:
    """One pair and its answers, see ``make_batch``."""
    g, shape = generator, tuple(int(n) for n in shape)
    stretch = _stretch(g, len(shape))
    there, back = random_displacements(shape, stretch, generator=g)
    scene = draw_scene(shape, stretch, generator=g)
    grid = identity_grid(shape, device=g.device)
    greys = draw_greys(scene, g)
    other = jitter(greys, 0.03, g) if chance(g, same_contrast) else draw_greys(scene, g)
    sides = {"fixed": (grid, greys), "moving": (grid + back, other)}
    if chance(g, 0.5):  # the image that is evaluated at warped places differs in the last bits
        sides, there, back = {"fixed": sides["moving"], "moving": sides["fixed"]}, back, there
    pair = {"displacement": there, "inverse": back}
    common, unlike = draw_greys(scene, g), uniform(g, 0, UNLIKE) if chance(g, 0.7) else 0.0
    for side, (tissue, means) in sides.items():
        # no patient is a warp of another: the borders of one image alone bend, and may fold; its texture does not
        bends = smooth_noise(shape, len(shape), uniform(g, 4, 10) * stretch, generator=g)
        label = label_map(scene, tissue + unlike * bends)
        image, mask = scan(label, scene.texture(tissue), means, generator=g)
        clean = blur(common[label.long()], 0.6)
        pair |= {f"{side}_image": image, f"{side}_label": label, f"{side}_mask": mask, f"{side}_clean": clean}
    return pair


def make_phantom(shape: Sequence[int], *, seed: Sequence[int]) -> Phantom:
    """A pair as ``phantoms.scenes`` makes them, for a folder on disk; its landmarks are at random places.

    The pair has no masks: what lies beyond a cropped field of view counts as image.
    """
    generator = Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    pair = {name: tensor[0] for name, tensor in make_pair(shape, generator=generator).items()}
    last = torch.tensor(shape) - 1.0
    points = last * torch.rand(4 * LANDMARKS, len(shape), generator=generator)
    moved = points + sample_at(pair["displacement"][None], points[None])[0]
    seen = ((moved >= 0) & (moved <= last)).all(1)
    return Phantom(
        *(pair[f"{side}_image"][0].numpy() for side in SIDES),
        *(pair[f"{side}_label"][0].numpy().astype(np.uint8) for side in SIDES),
        *(pair[name].numpy() for name in ("displacement", "inverse")),
        *(ends[seen][:LANDMARKS].numpy() for ends in (points, moved)),
    )


# ---- motion


def random_displacements(shape: Sequence[int], stretch: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """A random diffeomorphism and its inverse as displacements (1, D, *shape) in voxels.

    An affine motion after the flow of a velocity, noise at several scales; either may be absent. The largest motion of
    the flow is between nothing and ``LARGEST_MOTION`` of the longest side, small ones more often.
    """
    g, dim = generator, len(shape)
    half = [-(-n // 2) for n in shape]  # integrated at half resolution: its finest scale has 8 voxels
    velocity = torch.zeros(1, dim, *half, device=g.device)
    for scale in (8, 16, 32, 64):
        if chance(g, 0.7):
            waves = smooth_noise(half, dim, scale / 2 * stretch, generator=g)
            velocity += scale**0.3 * uniform(g, 0, 1) * waves
    most = LARGEST_MOTION / 2 * max(shape) * uniform(g, 0, 1) ** 2  # in voxels of the half grid
    velocity *= most / velocity.square().sum(1).amax().sqrt().clamp(min=1e-6)
    steepest = max(float(differences(velocity, axis).abs().amax()) for axis in range(dim))
    velocity *= min(1.0, STEEPEST / max(steepest, 1e-6))
    flow, back = (resize(u, shape) for u in integrate_both(velocity))
    if chance(g, 0.4):
        return flow, back
    return _after_affine(flow, back, *_draw_affine(shape, uniform(g, 0, 1), g))


def _draw_affine(shape: Sequence[int], amount: float, g: Generator) -> tuple[Tensor, Tensor]:
    dim = len(shape)
    matrix = torch.linalg.matrix_exp(amount * 0.08 * normal(g, dim, dim))
    return matrix, amount * 0.05 * normal(g, dim) * torch.tensor(shape, device=g.device)


def _after_affine(flow: Tensor, back: Tensor, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``x -> A (x + flow(x) - c) + c + t`` and its inverse, as displacements."""
    shape = flow.shape[2:]
    grid = identity_grid(shape, device=flow.device)
    centre = ((torch.tensor(shape, device=flow.device) - 1) / 2).view(1, -1, *[1] * len(shape))
    offset = centre + shift.view_as(centre)
    forward = torch.einsum("ij,bj...->bi...", matrix, grid + flow - centre) + offset - grid
    before = torch.einsum("ij,bj...->bi...", torch.linalg.inv(matrix), grid - offset) + centre
    return forward, before + warp(back, before - grid) - grid


# ---- scenes


def draw_scene(shape: Sequence[int], stretch: Tensor, *, generator: Generator) -> Scene:
    """Shapes that are the largest of noises, or pasted blobs; some cut by a rim, with air around."""
    g = generator
    waves = noise_function(shape, len(shape), uniform(g, 12, 40) * stretch, generator=g)
    strength = uniform(g, 0, 8)
    inner, labels = (_noises if chance(g, 0.5) else _blobs)(shape, stretch, g)
    air = chance(g, AIR)
    around, shells = _body(shape, stretch, g) if air else (None, 0)

    def heights(places: Tensor) -> Tensor:
        bent = places + strength * waves(places)
        found = inner(bent)
        return found if around is None else around(bent, found)

    fine, coarse = (noise_function(shape, 1, uniform(g, *s) * stretch, generator=g) for s in ((1.5, 4), (4, 12)))
    share = uniform(g, 0, 1)
    return Scene(heights, lambda places: share * fine(places) + (1 - share) * coarse(places), labels + shells, air)


def _noises(shape: Sequence[int], stretch: Tensor, g: Generator) -> tuple[Callable[[Tensor], Tensor], int]:
    """Noise at two scales (SynthMorph's shapes): small ones in large ones."""
    counts = integer(g, 3, 8), integer(g, 2, 8)
    scales = uniform(g, 16, 48), uniform(g, 6, 16)
    parts = [noise_function(shape, n, s * stretch, generator=g) for n, s in zip(counts, scales, strict=True)]
    factor = uniform(g, 0.5, 1.0)
    return lambda places: torch.cat([parts[0](places), factor * parts[1](places)], 1), sum(counts)


def _blobs(shape: Sequence[int], stretch: Tensor, g: Generator) -> tuple[Callable[[Tensor], Tensor], int]:
    """Ellipsoids with noisy surfaces, the smaller ones above the larger ones, on a background."""
    count, dim = integer(g, 6, 16), len(shape)
    side = torch.tensor(shape, device=g.device) - 1.0
    centres = (torch.rand(count, dim, generator=g, device=g.device) - 0.5) * side * MARGIN + side / 2
    size = torch.exp(uniform(g, 0.6, 1.4) * -torch.rand(count, 1, generator=g, device=g.device) * 2) * float(side.min())
    radii = 0.5 * size * torch.exp(0.3 * normal(g, count, dim)) * stretch.to(g.device)
    order = radii.prod(1).argsort(descending=True)
    turn = normal(g, count, dim, dim)
    to_ball = (torch.linalg.matrix_exp(turn - turn.transpose(1, 2)) / radii[..., None])[order]
    centres = centres[order]
    ripple = noise_function(shape, count, uniform(g, 8, 24) * stretch, generator=g)
    above = 1 + torch.arange(count, device=g.device)

    def heights(places: Tensor) -> Tensor:
        flat = places.flatten(2)[0]  # (D, N)
        turned = to_ball.transpose(1, 2)
        ball = torch.baddbmm(-(turned @ centres[..., None]), turned, flat.expand(count, -1, -1))
        reach = ball.square().sum(1).sqrt().view(1, count, *places.shape[2:])
        inside = above.view(1, -1, *[1] * dim) * (1 - reach + 0.25 * ripple(places))
        return torch.cat([torch.zeros_like(inside[:, :1]), inside], 1)

    return heights, count + 1


def _body(shape: Sequence[int], stretch: Tensor, g: Generator) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Air around an ellipsoid with a noisy surface, and rims of it: what turns a scene's heights into the body's."""
    dim = len(shape)
    side = torch.tensor(shape, device=g.device) - 1.0
    radii = 0.5 * side * (0.65 + 0.4 * torch.rand(dim, generator=g, device=g.device))
    centre = side / 2 + 0.05 * side * normal(g, dim)
    ripple = noise_function(shape, 1, uniform(g, 16, 48) * stretch, generator=g)
    rough, shells = uniform(g, 0, 0.15), integer(g, 0, 3)
    thick = [uniform(g, 2, 6) / float(radii.min()) for _ in range(shells)]

    def around(places: Tensor, inner: Tensor) -> Tensor:
        column = [1, -1, *[1] * dim]
        ball = (places - centre.view(column)) / radii.view(column)
        reach = ball.square().sum(1, keepdim=True).sqrt() + rough * ripple(places)
        layers, outer = [], 1.0
        for depth in thick:
            layers.append(torch.minimum(outer - reach, reach - (outer - depth)))
            outer -= depth
        # where a layer is, its height is above all else; no step, for heights are interpolated
        beyond = [1e3 * layer for layer in (reach - 1, *layers)]
        return torch.cat([*beyond, inner], 1)

    return around, 1 + shells


def label_map(scene: Scene, tissue: Tensor) -> Tensor:
    """Labels (1, 1, *S) int32 of the tissue (1, D, *S) under each voxel.

    In 3D the heights, which are smooth, are evaluated at every second voxel and interpolated: a fifth of the time.
    """
    shape = tissue.shape[2:]
    if len(shape) == 2:
        heights = scene.heights(tissue)
    else:
        heights = resize_image(scene.heights(resize_image(tissue, [-(-n // 2) for n in shape])), shape)
    return _highest(heights)


def _highest(heights: Tensor) -> Tensor:
    """argmax over the channels (1, K, *S) -> (1, 1, *S) int32; torch's own takes ten times as long across memory."""
    top = heights[:, :1].clone()
    label = torch.zeros_like(top, dtype=torch.int32)
    for k in range(1, heights.shape[1]):
        height = heights[:, k : k + 1]
        label.masked_fill_(height > top, k)
        torch.maximum(top, height, out=top)
    return label


def draw_greys(scene: Scene, g: Generator) -> Tensor:
    """A grey value in [0, 1] for each label (K,): spread evenly, or as they come, when some borders vanish."""
    count = scene.labels
    greys = torch.rand(count, generator=g, device=g.device)
    if chance(g, 0.6):
        greys = (torch.randperm(count, generator=g, device=g.device) + 0.5 * greys) / count
    if scene.air and chance(g, 0.85):
        greys = 0.15 + 0.85 * greys
        greys[0] = uniform(g, 0, 0.04)
    return greys


def jitter(values: Tensor, amount: float, g: Generator) -> Tensor:
    return values + amount * torch.randn(values.shape, generator=g, device=g.device)


def _stretch(g: Generator, dim: int) -> Tensor:
    """(dim,) How much longer things are along each axis: voxels need not be cubes."""
    stretch = torch.ones(dim)
    if chance(g, 0.3):
        stretch[integer(g, 0, dim - 1)] = 1 / uniform(g, 1, 3)
    return stretch

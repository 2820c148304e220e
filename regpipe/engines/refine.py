"""Per-pair optimisation of the velocity: from the network's answer, or from zero without any network.

Adam minimises the loss of the training (``losses.loss``) over the velocity of one pair, coarse to fine. The network is
not touched, and nothing is kept from one pair to the next. Each level sees one half of the noise, and what it finds
counts where the other half supports it (``engines.judge``), so that nothing is found where there is nothing to find.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpipe.data.pairs import SIDES
from regpipe.engines.adam import Adam
from regpipe.engines.channels import ALIKE, Channels, each_pair, weight_of
from regpipe.engines.judge import Judge, halves_of
from regpipe.engines.pyramid import coarser_shape, levels_of, pyramid_level, shares
from regpipe.fields.algebra import LAYERS, Layers, register, resize, resize_image
from regpipe.losses.contrast import AS_IT_IS, in_one
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.noise import with_noise
from regpipe.losses.terms import TERMS, Target, overlaps, with_distances
from regpipe.networks.encoders import VELOCITY_STRIDE
from regpipe.networks.extractor import DEFAULT, described, extractor, extractors
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.settings import RefinementOptions

SQUARINGS = 6  # a sixty-fourth of the velocity at a time: under 0.01 voxel from the 7 of the final integration
STRUCTURES, BESIDE_STRUCTURES = 10.0, 0.3  # weight of those the network sees; the similarity's, then
# By dimension. LNCC's window in voxels: 5 x 5 pixels say less than 5 x 5 x 5 voxels. A factor on the regularity:
# ``diffusion`` is a mean over 4 derivatives in 2D and over 9 in 3D, so that the same weight holds a slice more stiffly.
WINDOW = {2: 7, 3: 5}
REGULAR = {2: 0.7, 3: 1.0}
ZERO_STEPS = 80
SHIPPED_STEPS = 25  # after the answer of a network that came with regpipe, where nothing is asked for
WITNESS = 4000  # voxels that tell mutual information
REGULARITY_WEIGHTS = {"diffusion": 0.4, "divergence": 0.1}
# a pair's own truth -> its terms and their weights
GUIDES = {"labels": {"dice": 10.0, "distance": 10.0}, "landmarks": {"landmarks": 1.0}}

# Adam steps at full length however small a gradient is, even where it is rounding noise. Gradients count per point of
# the velocity, so that this much of the loss per voxel of motion, a hundredth of what an edge gives, is where it slows.
FLAT = 1e-3

Loss = RegistrationLoss | Mapping[int, RegistrationLoss]
NO_TRUTH: Target = MappingProxyType({})


class Refined(NamedTuple):
    """Velocities, and of each pair where its refinement began and in which contrast."""

    velocity: Tensor  # (B, D, *half)
    starts: Sequence[str]  # network | zero
    contrasts: Sequence[str | None]  # see ``losses.contrast``; None where that was not asked


class _One(NamedTuple):
    """The same of one pair."""

    velocity: Tensor
    start: str
    contrast: str | None = None


class Refiner:
    """``refiner(fixed, moving, velocity=None) -> velocity``: minimises a loss over the velocity of each pair.

    Without a velocity it starts from zero, through coarser grids. Deterministic: pairs do not touch each other.

    Args:
        loss: what to minimise, or what for each dimension. Its layers warp and integrate, in ``SQUARINGS`` steps at
            most.
        steps: of Adam, over all levels together.
        rate: Adam's step in voxels of the velocity's grid.
        finest: stride of the finest level's images; 2 where full resolution is not worth its eight-fold cost; None:
            see ``engines.pyramid.levels_of``.
        guided: each pair brings the labels or landmarks that terms of the loss need. Its result is not judged then:
            they know more than the images show.

    Raises:
        InputError: no step, or a loss whose terms need labels or landmarks that guide nothing.
    """

    channels = ALIKE  # how further images of a side compare, where a pair has some

    def __init__(
        self, loss: Loss, *, steps: int = 50, rate: float = 0.15, finest: int | None = 1, guided: bool = False
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"refinement takes at least one step, got {steps}; leave it out for none")
        losses = dict(loss) if isinstance(loss, Mapping) else {dim: loss for dim in WINDOW}
        terms = {name for of_dim in losses.values() for name in of_dim.weights}
        known = {term for of_guide in GUIDES.values() for term in of_guide} if guided else set()
        supervised = sorted(name for name in terms - known if TERMS[name].needs)
        if supervised:
            raise InputError(f"refinement cannot use {', '.join(supervised)}: a new pair has no such truth")
        self.losses, self.steps, self.rate, self.finest = losses, steps, rate, finest
        self.guides = guides_of(terms) if guided else []
        self.judged = not self.guides  # see ``engines.judge``; a dry run without numbers has nothing to judge
        self.layers = next(iter(losses.values())).layers.in_steps(SQUARINGS)

    def __call__(self, fixed: Tensor, moving: Tensor, velocity: Tensor | None = None, **told: Any) -> Tensor:
        """What ``refine`` finds: velocity (B, D, *half) for images (B, 1, *spatial)."""
        return self.refine(fixed, moving, velocity, **told).velocity

    def refine(
        self,
        fixed: Tensor,
        moving: Tensor,
        velocity: Tensor | None = None,
        *,
        better: bool = False,
        masks: Sequence[Tensor] = (),
        anatomy: Tensor | None = None,
        truth: Target = NO_TRUTH,
        channels: Sequence[Tensor] = (),
    ) -> Refined:
        """The velocities of pairs (B, 1, *spatial), each on its own, and how each was found.

        Args:
            better: begin from zero, with ``ZERO_STEPS`` at least, where no part of ``velocity`` pays.
            masks: fixed and moving, where they count.
            anatomy: what a network made of both images, see ``regpipe.SymmetricNet``.
            truth: labels and landmarks of both, as ``data.load`` names them, that guide.
            channels: further images of the fixed and the moving side, (B, C - 1, *spatial), on the same grid.
        """
        dim = fixed.ndim - 2
        if dim not in self.losses:
            raise InputError(f"--features: takes no {dim}D images; give an extractor of these")
        mine, found = self._sharing(dim, 1 + channels[0].shape[1] if channels else 1), list[_One]()
        for i, pair in enumerate(each_pair(fixed, moving, masks, anatomy, truth, channels)):
            found.append(mine._one(pair, None if velocity is None else velocity[i : i + 1].float(), better))
        velocities, starts, contrasts = zip(*found, strict=True)
        return Refined(torch.cat(velocities), starts, contrasts)

    def _sharing(self, dim: int, many: int) -> Refiner:
        """The refiner of pairs of so many channels."""
        if many == 1 and self.channels == ALIKE:
            return self
        shared = copy.copy(self)
        shared.losses = {dim: self.channels.loss(self.losses[dim], many)}
        return shared

    def _one(self, batch: Target, start: Tensor | None, better: bool) -> _One:
        halves, loss = self._halves(batch), self.losses[batch["fixed_image"].ndim - 2]
        one = self._from_start(halves, start, better)
        any_contrast = any("auto" in each.weights for each in (loss, *loss.channels))
        if not any_contrast or self._judge(one.velocity.shape[1]) is None:  # what knows more does not ask
            return one
        aligned = start if start is not None and one.start == "network" else torch.zeros_like(one.velocity)
        mapped, each = self._in_one_contrast(batch, aligned, loss)
        how = ", ".join(each)
        one = one._replace(contrast=", ".join([AS_IT_IS] * len(each)))
        if how == one.contrast:
            return one
        other = self._from_start(self._halves(mapped), start, better)._replace(contrast=how)
        return other if Judge(loss, self.layers).tells_more(halves[1], other.velocity, one.velocity) else one

    def _from_start(self, halves: tuple[Target, Target], start: Tensor | None, better: bool) -> _One:
        seen, unseen = halves
        mine, steps = start, self.steps
        if better and start is not None:
            judge = self._judge(start.shape[1])
            mine = judge.paying(unseen, start) if judge else start
            if not bool(mine.any()):
                mine, steps = None, max(steps, ZERO_STEPS)
        found = self._refine(seen, unseen, mine, steps)
        return _One(found if start is None else resize(found, start.shape[2:]), "zero" if mine is None else "network")

    def _in_one_contrast(self, batch: Target, velocity: Tensor, loss: RegistrationLoss) -> tuple[Target, list[str]]:
        """The pair with one image mapped to the other's contrast, where that explains more; and which, of each channel.

        ``velocity`` aligns the images before they are compared. It must not come from a similarity that assumes a
        linear relation of grey values: the relation found would be linear, too.
        """
        pairs = zip(batch.get("channels", ()), loss.channels, strict=True)
        others = [self._in_one_contrast(view, velocity, of_view) for view, of_view in pairs]
        mapped, how = dict(batch), [AS_IT_IS]
        if "auto" in loss.weights:
            fixed, moving = (batch[f"{side}_image"] for side in SIDES)
            result = register(fixed, moving, velocity, layers=self.layers)
            seen, _ = overlaps(result, batch, loss.options)
            found = in_one(fixed, moving, result.warped_moving, seen)
            mapped |= {"fixed_image": found.fixed, "moving_image": found.moving}
            how = [found.how]
        if others:
            mapped["channels"] = [view for view, _ in others]
        return mapped, how + [one for _, each in others for one in each]

    def _halves(self, batch: Target) -> tuple[Target, Target]:
        """The half that is optimised and the half that judges; the pair itself twice where nothing judges."""
        judged = self._judge(batch["fixed_image"].ndim - 2) is not None
        return halves_of(batch) if judged else (batch, batch)

    def _judge(self, dim: int) -> Judge | None:
        """None where a network sees structures: it knows more than the images show."""
        loss = self.losses[dim]
        return Judge(loss, self.layers) if self.judged and "predicted_dice" not in loss.weights else None

    @torch.enable_grad()
    def _refine(self, seen: Target, unseen: Target, velocity: Tensor | None, steps: int) -> Tensor:
        fixed = seen["fixed_image"]
        shape, given = fixed.shape[2:], velocity is not None
        levels = levels_of(shape, given, self.finest)
        plan = [(coarser_shape(shape, level.stride), n) for level, n in zip(levels, shares(levels, steps), strict=True)]
        voxels = sum(steps * math.prod(images) for images, steps in plan)
        judge = self._judge(len(shape))
        found = fixed.new_zeros(1, 1, *[1] * len(shape))  # what counted of a level so far
        if velocity is not None:
            found = (velocity != 0).any(1, keepdim=True).float()
        with Progress(what="optimising", unit="", total=voxels) as bar:
            for (stride, _), (images, steps) in zip(levels, plan, strict=True):
                grid = coarser_shape(images, VELOCITY_STRIDE)
                if velocity is None:
                    velocity = fixed.new_zeros(1, len(shape), *grid)
                elif not given:
                    velocity = resize(velocity, grid)
                level = with_noise(pyramid_level(seen, images))
                if "distance" in self.losses[len(shape)].weights:
                    level = with_distances(level, self.losses[len(shape)].options)
                after = self._descend(velocity, level, steps, bar)
                if judge:
                    enough = next((s for s, _ in plan if math.prod(s) >= max(WITNESS, math.prod(images))), plan[-1][0])
                    witness = pyramid_level(unseen, enough) if enough != images else None
                    level = pyramid_level(unseen, images)
                    share = judge.share(velocity, after, level, witness, stride=stride)
                    borne = resize_image(found, share.shape[2:])
                    if images == plan[-1][0] != plan[0][0]:  # a rim a voxel off is interpolation: it only goes on
                        share = share * (borne > 0.5)
                    found = torch.maximum(borne, share)
                    after = velocity + share * (after - velocity)
                velocity = after
        assert velocity is not None  # there is at least one level
        return velocity if given else resize(velocity, coarser_shape(shape, VELOCITY_STRIDE))

    def _descend(self, start: Tensor, target: Target, steps: int, bar: Progress) -> Tensor:
        velocity = start.detach().clone().requires_grad_(True)
        optimizer = Adam(velocity, lr=self.rate, eps=FLAT)
        points, loss = velocity[0, 0].numel(), self.losses[velocity.shape[1]]
        for _ in range(steps):
            optimizer.zero_grad()
            result = register(target["fixed_image"], target["moving_image"], velocity, layers=self.layers)
            value, terms = loss.weigh(result._asdict(), target)
            if not math.isfinite(terms["loss"]):  # torch's sampler, going backwards from a NaN, writes out of bounds
                raise InputError(f"refinement: {terms} is not finite; look at these images, or leave it out")
            (points * value).backward()
            optimizer.step()
            bar.update(target["fixed_image"].numel())
        return velocity.detach()


def guides_of(terms: Iterable[str]) -> list[str]:
    """Which of ``GUIDES`` these terms follow."""
    return sorted(name for name, of_guide in GUIDES.items() if not of_guide.keys().isdisjoint(terms))


def refinement_loss(
    similarity: str, *, structures: int = 0, smoothness: float = 1.0, spatial_dims: int = 3, guide: Sequence[str] = ()
) -> dict[str, float]:
    """Loss weights for refinement by one similarity, of which the regularity suits the size.

    ``structures``: how many the network tells apart; where any, they are laid onto each other too. ``smoothness`` is a
    factor on the regularity of ``spatial_dims``: below 1 follows the images further, at a higher SDlogJ. ``guide``: of
    ``GUIDES``, for a refiner that is guided.

    Raises:
        InputError: no such similarity or guide, or the smoothness is not above 0.
    """
    similar = weight_of(similarity) * (BESIDE_STRUCTURES if structures else 1.0)
    unknown = next((name for name in guide if name not in GUIDES), None)
    if unknown is not None:
        raise InputError(f"--guide {unknown}: choose among {', '.join(GUIDES)}")
    if not 0 < smoothness < math.inf:
        raise InputError(f"--smoothness {smoothness:g}: give more than 0, a number; 1 is the default")
    seen = {"predicted_dice": STRUCTURES} if structures else {}
    factor = smoothness * REGULAR[spatial_dims]
    regularity = {name: factor * weight for name, weight in REGULARITY_WEIGHTS.items()}
    led = {term: weight for name in guide for term, weight in GUIDES[name].items()}
    return {similarity: similar, **seen, **led, **regularity}


class Refinement(NamedTuple):
    """The refinement that a configuration asks for, 0 steps for none. ``finest``, ``guided``: as ``Refiner``'s."""

    steps: int
    weights: Mapping[str, float]
    window: int = WINDOW[3]
    finest: int | None = 1
    layers: Layers = LAYERS
    guided: bool = False
    channels: Channels = ALIKE
    features: str | None = None  # of the ``features`` term: ``networks.extractor``, of ``spatial_dims``
    spatial_dims: int | None = None

    def refiner(self) -> Refiner | None:
        """The refiner; None for 0 steps."""
        if not self.steps:
            return None
        looks = None
        if self.by_features:
            if self.spatial_dims is None:
                raise InputError("similarity features: give Refinement the spatial_dims of the images")
            looks = extractor(self.features or DEFAULT, self.spatial_dims)
        loss = RegistrationLoss(self.weights, window=self.window, layers=self.layers, encoder=looks)
        refiner = Refiner(loss, steps=self.steps, finest=self.finest, guided=self.guided)
        refiner.channels = self.channels
        return refiner

    @property
    def by_features(self) -> bool:
        return bool(self.weights.get("features"))

    def asked(self) -> dict[str, Any]:
        """The ids of a configuration that ask for it."""
        asked: dict[str, Any] = {"refine": self.steps, "refine_loss": dict(self.weights), "refine_window": self.window}
        asked |= {"guide": guides_of(self.weights)} if self.guided else {}
        return asked | self.channels.asked() | (described(self.features or DEFAULT) if self.by_features else {})


def make_refiner(steps: int, weights: Mapping[str, float], **more: Any) -> Refiner | None:
    """The refiner of a ``Refinement``; None for 0 steps."""
    return Refinement(steps, weights, **more).refiner()


def zero_refiner(similarity: str | Sequence[str] = "auto", *, steps: int = ZERO_STEPS, **given: Any) -> Refiner:
    """The refiner for pairs of any dimension without any network, by ``RefinementOptions``.

    Of a TorchScript file of ``features``, which has one dimension, only that is refined.
    """
    asked = RefinementOptions(similarity, **given)
    chosen = {dim: refinement_loss(**asked.loss, spatial_dims=dim) for dim in WINDOW}
    looks = extractors(asked.features or DEFAULT) if asked.first == "features" else dict.fromkeys(chosen)
    losses = {dim: RegistrationLoss(chosen[dim], window=WINDOW[dim], encoder=encoder) for dim, encoder in looks.items()}
    refiner = Refiner(losses, steps=steps, finest=asked.finest, guided=bool(asked.guide))
    refiner.channels = Channels.of(asked)
    return refiner

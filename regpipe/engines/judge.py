"""Which part of a registration the images support, judged on noise that the optimisation has not seen.

Where there is nothing else to follow, a similarity follows noise, and rises. So the optimisation sees one half of
``losses.noise.split_noise``, and what it finds is kept only where it makes the other half more alike, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regpipe.data.pairs import SIDES
from regpipe.engines.pyramid import FROM_NETWORK, coarsen, coarser_shape, pyramid_level
from regpipe.fields.algebra import Layers, Registration, register, resize_image
from regpipe.losses.lncc import box_sum
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.noise import SHARE, split_noise
from regpipe.losses.terms import Target, explained, overlaps
from regpipe.transforms.likeness import information

LOCAL = {"auto", "lncc"}  # terms that compare by local correlation
REACH = 15  # voxels of a side of the neighbourhood that is judged together
GAIN = 0.08  # of what is explained, or of what is not where that is less, by which the explained share has to rise
FAINT = 0.01  # of what can be explained: what rises by less is no evidence, however little there was before
MARGIN = 2.0  # times what the opposite step gains: any interpolation smooths, and raises it
LEAST = 0.25  # of a neighbourhood that has to lie in a mask for its mean to count in full
# Correlation of a neighbourhood's detail from which on it is of both images: at strides of 1 and 2, before the step; of
# coarser levels of speckle, where fewer grains are more often alike by chance, before it and after it.
ALIKE, ALIKE_COARSE, LAID, TINY = 0.25, 0.4, 0.75, 1e-12
LOOKS = 0.05  # of itself: local correlation that rises by more while mutual information falls follows a contrast
CLEARER, CONVINCING = 1.01, 1.05  # times the mutual information of the pair as it is, and of no motion
SEEN, UNSEEN = (1 + SHARE**2) ** 0.5, (1 + 1 / SHARE**2) ** 0.5  # noise of the halves, in standard deviations


def halves_of(batch: Target) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pair twice, with noise that is independent, and the noise beside it: what is optimised, and what judges."""
    seen, unseen = dict(batch), dict(batch)
    if "channels" in batch:
        seen["channels"], unseen["channels"] = zip(*map(halves_of, batch["channels"]), strict=True)
    for side in SIDES:
        halves = split_noise(batch[f"{side}_image"])
        unseen["speckled"] = unseen.get("speckled", False) or halves.speckled
        seen |= {f"{side}_image": halves.seen, f"{side}_noise": SEEN * halves.noise}
        unseen |= {f"{side}_image": halves.unseen, f"{side}_noise": UNSEEN * halves.noise}
    return seen, unseen


class Judge:
    """``judge.share(before, after, unseen)``: how much of a step of the velocity counts, at each place.

    Local correlation is judged in neighbourhoods of ``REACH`` voxels. Where it rises while mutual information falls, it
    misreads the images' contrasts: the pair is ``misled``, and no step counts any more. Any other similarity is judged
    by one number for the whole image. Of several channels each judges by itself: what one
    of them bears out counts.
    """

    def __init__(self, loss: RegistrationLoss, layers: Layers) -> None:
        self.others = [Judge(of_channel, layers) for of_channel in loss.channels]
        self.loss, self.layers = loss, layers
        self.local = not LOCAL.isdisjoint(loss.weights)
        self.misled = False

    @torch.no_grad()
    def share(
        self, before: Tensor, after: Tensor, unseen: Target, witness: Target | None = None, *, stride: int | None = None
    ) -> Tensor:
        """(1, 1, *grid) in [0, 1] for velocities (1, D, *grid) and a target of images (1, 1, *spatial).

        ``witness``: the images that tell mutual information, of a finer level where this one has too few voxels.
        ``stride``: of the level, by which local correlation asks for detail that is in both images; None: it does not.
        """
        share = self._share(before, after, unseen, witness)
        if self.local and stride is not None:
            share = share * self._shared(before, after, unseen, stride)
        for i, judge in enumerate(self.others):
            views = unseen["channels"][i], witness and witness["channels"][i]
            share = torch.maximum(share, judge.share(before, after, *views, stride=stride))
        return share

    def _share(self, before: Tensor, after: Tensor, unseen: Target, witness: Target | None) -> Tensor:
        if not self.local:
            return self._as_one(before, after, unseen)
        was, found, opposite = (self._register(v, unseen) for v in (before, after, 2 * before - after))
        base, gained, lost = (self._explained(r, unseen) for r in (was, found, opposite))
        gain, wrong = gained - base, lost - base
        better = (gain > GAIN * torch.minimum(base, 1 - base)) & (gain > FAINT) & (gain > MARGIN * wrong)
        share = resize_image(_mean(better.float()), before.shape[2:])
        step = before + share * (after - before)
        kept = self._register(step, unseen)
        if float(self._explained(kept, unseen).mean()) > (1 + LOOKS) * float(base.mean()):
            if witness is not None:
                unseen, was, kept = witness, self._register(before, witness), self._register(step, witness)
            self.misled |= self._known(kept, unseen) < self._known(was, unseen)
        return torch.zeros_like(share) if self.misled else share

    def _shared(self, before: Tensor, after: Tensor, unseen: Target, stride: int) -> Tensor:
        """Where the detail of this level is that of both images: (1, 1, *grid) in [0, 1], for velocities (1, D, *grid).

        Speckle of two planes is not: its grains are larger than a voxel, so that the noise's halves do not tell it, and
        grain after grain could be laid upon its like. But what is one tissue's correlates a little as soon as the
        coarser levels have laid it there. The coarse levels themselves may have far to go: they count, and of speckle
        where it fits well afterwards.
        """
        if stride <= 2:
            return self._alike(before, unseen, ALIKE)
        if unseen["speckled"]:
            return torch.maximum(self._alike(before, unseen, ALIKE_COARSE), self._alike(after, unseen, LAID))
        return torch.ones_like(before[:, :1])

    def _alike(self, velocity: Tensor, unseen: Target, least: float) -> Tensor:
        result = self._register(velocity, unseen)
        pairs = ((unseen["fixed_image"], result.warped_moving), (unseen["moving_image"], result.warped_fixed))
        masks = overlaps(result, unseen, self.loss.options)
        ways = [_alike(*pair, mask, least) for pair, mask in zip(pairs, masks, strict=True)]
        return resize_image((ways[0] + ways[1]) / 2, velocity.shape[2:])

    def paying(self, unseen: Target, velocity: Tensor) -> Tensor:
        """What pays of a network's velocity, at the resolution where refinement begins."""
        shape = coarser_shape(unseen["fixed_image"].shape[2:], FROM_NETWORK[0].stride)
        return velocity * self.share(torch.zeros_like(velocity), velocity, pyramid_level(unseen, shape))

    def tells_more(self, unseen: Target, velocity: Tensor, other: Tensor) -> bool:
        """Whether the images, as they are, tell clearly more of each other by a velocity than by the other and by none.

        A curve that is not one-to-one makes a rim look like what lies deeper inside: what follows that gains little.
        """
        told, as_it_is, none = (self.information(v, unseen) for v in (velocity, other, torch.zeros_like(velocity)))
        return told > CLEARER * as_it_is and told > CONVINCING * none

    def _as_one(self, before: Tensor, after: Tensor, unseen: Target) -> Tensor:
        """All of the step where it is better than none of it, than half of it and than the opposite, else none."""
        velocities = (before, after, (before + after) / 2, 2 * before - after)
        was, found, half, opposite = (self._unlike(self._register(v, unseen), unseen) for v in velocities)
        better = found < half and found < was and was - found > MARGIN * (was - opposite)
        return torch.full_like(before[:, :1], float(better))

    def _register(self, velocity: Tensor, unseen: Target) -> Registration:
        return register(unseen["fixed_image"], unseen["moving_image"], velocity, layers=self.layers)

    def _explained(self, result: Registration, unseen: Target) -> Tensor:
        forward, back = (_mean(x, mask) for x, mask in explained(result, unseen, self.loss.options))
        return (forward + back) / 2

    @torch.no_grad()
    def information(self, velocity: Tensor, images: Target) -> float:
        """Mutual information in nats, the sum of both ways and all channels, where both images are known."""
        own = self._known(self._register(velocity, images), images)
        pairs = zip(self.others, images.get("channels", ()), strict=True)
        return own + sum(judge.information(velocity, view) for judge, view in pairs)

    def _known(self, result: Registration, images: Target) -> float:
        pairs = ((result.warped_moving, images["fixed_image"]), (result.warped_fixed, images["moving_image"]))
        masks = overlaps(result, images, self.loss.options)
        return sum(_told(*pair, mask) for pair, mask in zip(pairs, masks, strict=True))

    def _unlike(self, result: Registration, unseen: Target) -> float:
        terms = {name: self.loss.terms[name] for name in self.loss.weights}
        similar = {name: term for name, term in terms.items() if term.kind == "similarity"}
        options = self.loss.options
        return sum(self.loss.weights[n] * float(t.function(result, unseen, options)) for n, t in similar.items())


def _alike(a: Tensor, b: Tensor, mask: Tensor | None, least: float) -> Tensor:
    """The share of each neighbourhood (B, 1, *spatial) in which two images' detail correlates by ``least``."""
    details = []
    for image in (a, b):
        detail = image - resize_image(coarsen(image, coarser_shape(image.shape[2:], 2)), image.shape[2:])
        details.append(detail if mask is None else detail * mask)
    a, b = details
    both = box_sum(a * b, REACH) / (box_sum(a * a, REACH) * box_sum(b * b, REACH)).sqrt().clamp(min=TINY)
    return _mean((both.abs() > least).float())


def _mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Over ``REACH`` voxels around each, or over those of them in the mask, ``LEAST`` of them at least."""
    counts = torch.ones_like(x) if mask is None else mask
    all_there = box_sum(torch.ones_like(x), REACH)
    return box_sum(x, REACH) / torch.maximum(box_sum(counts, REACH), LEAST * all_there)


def _told(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    inside = torch.ones_like(a, dtype=torch.bool) if mask is None else mask > 0.5
    return information(*(x[inside].clamp(0, 1).cpu().numpy() for x in (a, b))) if bool(inside.any()) else 0.0

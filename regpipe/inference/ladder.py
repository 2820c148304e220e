"""What is given up where memory is short: what costs least comes first, and each step is reported.

    as asked -> bfloat16 -> refinement at coarser images -> the network on overlapping tiles -> an error that says so

A rung replaces an inferer and a network by ones that need less memory; ``inference.memory`` predicts whether they fit.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regpipe.data import channels
from regpipe.data.load import LoadPair
from regpipe.data.pairs import SIDES, Case
from regpipe.engines.inferers import Inferer
from regpipe.engines.pyramid import SMALLEST
from regpipe.engines.uncertainty import BESIDE, Ensemble
from regpipe.fields.algebra import LAYERS, resize_image
from regpipe.inference import memory
from regpipe.io.labels import read_label
from regpipe.metrics.measures import shared_labels
from regpipe.networks.symmetric import VELOCITY_STRIDE, Prediction, SymmetricNet, joined, parted, prediction
from regpipe.networks.weights import channels_of
from regpipe.utils import distributed, machine
from regpipe.utils.errors import LESS_MEMORY, InputError
from regpipe.utils.machine import GIB

log = logging.getLogger(__name__)

TILES = (129, 97, 65)  # points along an axis, 16 k + 1 as the network wants them
OVERLAP = 32  # points at least; a network's reach is more, but what is far tells it little
PLENTY = 1 << 14  # bytes a voxel: no 2D or 3D task takes as much, so that a small one need not be predicted

Rung = Callable[[Any, Any], tuple[Any, Any]]  # (inferer, network) -> the same, needing less


class Step(NamedTuple):
    """A rung: its description, what it does, and its kind: of one kind the last rung taken counts."""

    told: str
    take: Rung
    kind: str


class FittingInferer(Inferer):
    """An inferer that goes down the ladder, for each pair anew, until the pair is predicted to fit into memory.

    ``to_fit_memory`` of its output lists the steps that were taken, in words.

    Args:
        inferer: of ``engines.inferers``.
        memory_gib: what the whole process may take; None: its share of what the machine has free now, a container's
            limit included, or less where there is less later.
        uncertainty: whether each answer says how far off it may be, see ``engines.uncertainty``.
    """

    def __init__(self, inferer: Any, *, memory_gib: float | None = None, uncertainty: bool = False) -> None:
        if memory_gib is not None and not memory_gib > 0:
            raise InputError(f"--memory_gib {memory_gib}: give more than 0, or leave it out for what is free")
        self.inferer, self.memory_gib, self.uncertainty = inferer, memory_gib, uncertainty
        self.layers = getattr(inferer, "layers", LAYERS)
        self._share, self._held = machine.share(memory_gib, distributed.device()), machine.held()
        if memory_gib is not None and self._share <= 0:
            own = memory_gib - self._share / GIB
            raise InputError(f"--memory_gib {memory_gib:g}: this process holds {own:.2f} GiB already; give more")
        self._channels = 1  # of the pair at hand
        self._needs: dict[tuple[Any, ...], int] = {}  # grid and steps -> bytes
        self._said: dict[tuple[int, ...], list[str]] = {}  # grid -> the steps that were told last

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        shape = tuple(int(n) for n in inputs.shape[2:])
        self._channels = 1 + (kwargs["channels"][0].shape[1] if kwargs.get("channels") else 0)
        steps = self._steps(shape, network, inputs.device)
        inferer, network = descended(self.inferer, network, steps)
        inferer = Ensemble(inferer) if self.uncertainty else inferer
        return {**inferer(inputs, network, *args, **kwargs), "to_fit_memory": [step.told for step in steps]}

    def _room(self, device: torch.device) -> int:
        """What was asked for; else the share, or what is free where less, with what earlier pairs left behind."""
        if self.memory_gib is not None:
            return self._share
        left = machine.held_since(self._held) if device.type == "cpu" else 0
        return min(self._share, machine.free(device) + left)

    def _steps(self, shape: tuple[int, ...], network: Any, device: torch.device) -> list[Step]:
        """The rungs to take on a grid; none where the memory that they need cannot be predicted."""
        room = self._room(device)
        if room > memory.LIBRARIES + PLENTY * self._channels * math.prod(shape):
            return []
        try:
            return self._fitting(shape, network, device, room)
        except memory.Unpredictable as error:
            if shape not in self._said:
                log.warning("what grid %s needs cannot be predicted (%s): nothing is given up", _grid(shape), error)
                self._said[shape] = []
            return []

    def _fitting(self, shape: tuple[int, ...], network: Any, device: torch.device, room: int) -> list[Step]:
        """Take rungs from the first one on until the pair fits, then drop those that were not needed.

        Raises:
            InputError: not even all of them fit.
        """

        def needed(steps: Sequence[Step]) -> int:
            key = (shape, self._channels, *(step.told for step in steps))
            if key not in self._needs:
                beside = BESIDE * math.prod(shape) if self.uncertainty else 0
                asked = descended(self.inferer, network, steps)
                predicted = memory.inference(*asked, shape, device=device, channels=self._channels)
                self._needs[key] = predicted + beside
            return self._needs[key]

        taken: list[Step] = []
        below = rungs(self.inferer, network, shape, device)
        while needed(taken) > room:
            step = next(below, None)
            if step is None:
                raise InputError(_too_large(shape, needed(taken), room))
            taken = [*(other for other in taken if other.kind != step.kind), step]
        for step in list(taken):
            without = [other for other in taken if other is not step]
            if needed(without) <= room:
                taken = without
        told = [step.told for step in taken]
        if self._said.setdefault(shape, []) != told:
            self._said[shape] = told
            needs = [needed(taken[:i]) / GIB for i in range(len(taken) + 1)]
            for step, before, after in zip(taken, needs[:-1], needs[1:], strict=True):
                words = "grid %s: %.2f GiB needed, %.2f GiB more than is free: %s, %.2f GiB"
                log.warning(words, _grid(shape), before, before - room / GIB, step.told, after)
        return taken


def require_memory(
    inferer: Any,
    network: nn.Module,
    loss: nn.Module,
    shape: Sequence[int],
    *,
    load: LoadPair | None = None,
    cases: Sequence[Case] = (),
    batch_size: int = 1,
    memory_gib: float | None = None,
    amp: bool = False,
) -> list[str]:
    """Make training on this grid fit into memory: by the network's ``checkpointing``, then without a cache in memory.

    Neither changes a result. Returns the steps that were taken. ``load`` and ``cases``: how pairs are loaded, and the
    pairs of training and validation; without them no cache is counted, and a single structure for a loss that takes all
    structures it finds. ``memory_gib``: see ``FittingInferer``.

    Raises:
        InputError: it does not fit; see ``inference.memory`` for what is predicted.
    """
    device, taken = next(network.parameters()).device, list[str]()
    room, kept = machine.share(memory_gib, device), _cache_bytes(load, cases, shape)
    needed = 0
    if room <= _training_bound(inferer, network, shape, batch_size) + kept:
        ids = _labels_of_one(cases, load) or (1,)

        def need() -> int:
            told: dict[str, Any] = {"batch_size": batch_size, "label_ids": ids, "device": device, "amp": amp}
            return memory.training(inferer, network, loss, shape, **told)

        try:
            needed = need()
        except memory.Unpredictable as error:  # of a loss of one's own that asks for numbers: no reason to refuse a run
            log.warning("the memory that training on grid %s needs cannot be predicted (%s)", _grid(shape), error)
    if needed > room and isinstance(network, SymmetricNet) and not network.checkpointing:
        network.checkpoint()
        before, needed = needed, need()
        told = "grid %s: training needs %.2f GiB, more than is free: --checkpointing true, %.2f GiB"
        log.warning(told, _grid(shape), before / GIB, needed / GIB)
        taken.append("checkpointing")
    if needed > room:
        raise InputError(
            f"training on a grid of {_grid(shape)} needs {needed / GIB:.2f} GiB, {max(room, 0) / GIB:.2f} GiB are "
            f"free: {LESS_MEMORY}; or give more --memory_gib to try nevertheless"
        )
    left = room - needed if device.type == "cpu" else machine.share(None)
    if load is not None and kept > left:
        told = "the cache would take %.2f GiB in the end, %.2f GiB are free beside training: --cache false"
        log.warning(told + "; --cache_dir DIR keeps it on disk", kept / GIB, left / GIB)
        load.cache = None
        taken.append("no cache")
    return taken


def _training_bound(inferer: Any, network: nn.Module, shape: Sequence[int], batch_size: int) -> int:
    """More bytes than any training takes: where so many are free, nothing has to be predicted."""
    weights = sum(p.numel() for p in network.parameters())
    return memory.LIBRARIES + 16 * weights + PLENTY * math.prod(shape) * batch_size * getattr(inferer, "cascades", 1)


def _cache_bytes(load: LoadPair | None, cases: Sequence[Case], shape: Sequence[int]) -> int:
    """Bytes that keeping every image of these pairs in memory takes at most; a cache on disk takes none."""
    if load is None or load.cache is None or load.store is not None:
        return 0
    images = {path for case in cases for side in SIDES for path in channels.images(case, side)}
    return memory.CACHED * math.prod(shape) * len(images)


def _labels_of_one(cases: Sequence[Case], load: LoadPair | None) -> tuple[int, ...]:
    """The structures that both images of the first labelled pair hold."""
    labels = [[case[key] for side in SIDES if (key := f"{side}_label") in case] for case in cases]
    both = next((files for files in labels if len(files) == 2), None)
    if both is None:
        return ()
    landmarks = None if load is None else load.landmark_channels
    return tuple(shared_labels(*(read_label(file, landmark_channels=landmarks)[0].array for file in both)))


def require_for_files(fixed: str, *shapes: Sequence[int], memory_gib: float | None = None, reusable: int = 0) -> None:
    """Raises ``InputError`` unless there is memory to write the results of registering images of these two shapes.

    ``reusable``: bytes that this process holds of earlier pairs.
    """
    shape = max(shapes, key=math.prod)
    needed, room = memory.native(shape), machine.room(memory_gib) + reusable
    if needed > room:
        raise InputError(
            f"{fixed}: writing files on {_grid(shape)} voxels needs {needed / GIB:.2f} GiB, "
            f"{max(room, 0) / GIB:.2f} GiB are free: free some, resample the images to larger voxels first, "
            "or give more --memory_gib to try nevertheless"
        )


def descended(inferer: Any, network: Any, steps: Sequence[Step]) -> tuple[Any, Any]:
    """Inferer and network after these steps."""
    for step in steps:
        inferer, network = step.take(inferer, network)
    return inferer, network


def _grid(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _too_large(shape: Sequence[int], needed: int, room: int) -> str:
    return (
        f"a grid of {_grid(shape)} needs {needed / GIB:.2f} GiB at least, {max(room, 0) / GIB:.2f} GiB are free: free "
        "some, take a coarser working grid, or give more --memory_gib to try nevertheless"
    )


def rungs(inferer: Any, network: Any, shape: Sequence[int], device: torch.device) -> Iterator[Step]:
    """The rungs that apply here, in order."""
    symmetric = isinstance(network, SymmetricNet)
    if symmetric and has_bfloat16(device):
        yield Step("the network in bfloat16", lambda inferer, net: (inferer, HalfPrecision(net)), "precision")
    if getattr(inferer, "refiner", None) is not None:
        for stride in (2,) if symmetric else (2, 4):  # after a network there is no coarser level
            if min(shape) < SMALLEST * stride:
                break
            yield Step(f"refinement at images every {stride} voxels", _coarser(stride), "refinement")
    for size in TILES if symmetric else ():
        if size < max(shape):
            yield Step(f"the network on tiles of {size} voxels", _tiled(size), "tiles")


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is no slower than float32 here: on GPUs since Ampere, and CPUs with matrix units (AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "amx_bf16" in cpu.read_text()


def _coarser(stride: int) -> Rung:
    def take(inferer: Any, network: Any) -> tuple[Any, Any]:
        less = copy.copy(inferer)
        less.refiner = copy.copy(inferer.refiner)
        less.refiner.finest = max(stride, inferer.refiner.finest or 1)
        return less, network

    return take


def _tiled(size: int) -> Rung:
    return lambda inferer, network: (inferer, Tiled(network, size))


class HalfPrecision:
    """A network under bfloat16's autocast; its output is float32."""

    def __init__(self, network: SymmetricNet) -> None:
        self.network, self.image_channels = network, network.image_channels

    def inner_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The network's."""
        return self.network.inner_shape(shape)

    def __call__(self, pair: Tensor, *args: Any, **kwargs: Any) -> Prediction:
        with torch.autocast(pair.device.type, dtype=torch.bfloat16):
            found = prediction(self.network(pair, *args, **kwargs))
        structures = None if found.structures is None else found.structures.float()
        return Prediction(found.velocity.float(), structures=structures)


class Tiled:
    """A ``SymmetricNet`` on overlapping tiles of its inner grid, their velocities blended by a Gaussian weight.

    A tile has 16 k + 1 points and starts at a multiple of 16, so that its velocity's grid lies on the whole's: no
    resampling, and a velocity is in voxels of the same grid. Weights know nothing of the images: swapping them flips
    the sign of each tile's velocity, hence of their mean, bit for bit. Integration is the caller's, on the whole.
    """

    def __init__(self, network: Any, size: int) -> None:
        self.network, self.size, self.image_channels = network, size, channels_of(network)
        self.most: int | None = None  # a dry run learns nothing from more tiles than two

    def __call__(self, pair: Tensor, *args: Any, **kwargs: Any) -> Prediction:
        from monai.data.utils import compute_importance_map, dense_patch_slices  # MONAI takes seconds to import

        whole = self.network.inner_shape(pair.shape[2:])
        pair = resize_image(pair, whole)
        tile = [min(self.size, n) for n in whole]
        every = [max(16, n - 1 - OVERLAP) for n in tile]
        grid, small, steps = ([math.ceil(n / VELOCITY_STRIDE) for n in sizes] for sizes in (whole, tile, every))
        weight = compute_importance_map(tuple(small), mode="gaussian", device=pair.device)
        counted = pair.new_zeros(grid)
        total: Tensor | None = None
        places = zip(dense_patch_slices(whole, tile, every), dense_patch_slices(grid, small, steps), strict=True)
        for seen, place in itertools.islice(places, self.most):
            found = prediction(self.network(pair[(slice(None), slice(None), *seen)], *args, **kwargs))
            folded = found.velocity if found.structures is None else joined(found.velocity, found.structures)
            if total is None:
                total = folded.new_zeros(*folded.shape[:2], *grid)
            total[(slice(None), slice(None), *place)] += weight * folded
            counted[place] += weight
        assert total is not None  # there is a tile
        mean = total / counted
        return Prediction(mean) if found.structures is None else parted(mean)

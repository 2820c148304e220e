"""Predicts how much memory a task takes, before it begins.

The task's own functions run on tensors without values (torch's ``FakeTensorMode``), while the bytes of all living
tensors are counted, operation by operation. That is exact for any network, and no table has to be kept. What torch's
kernels take beside their results is added by rule, what the allocator keeps by a factor; how both were measured is in
docs/memory.md.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import places_anew, warp_both
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.terms import needing
from regpipe.networks.symmetric import Prediction
from regpipe.networks.weights import channels_of

LIBRARIES = 20 << 20  # bytes: code and kernels that are loaded when they are first used
HEAP = 32 << 20  # bytes: glibc keeps what it is given back of smaller arrays
HEAP_SLACK = 0.5  # so much of them, at most
BACKWARD = 128 << 20  # bytes: what it keeps besides where gradients are made and dropped in another order
CUDA_CONTEXT, CUDA_SLACK = 512 << 20, 1.15  # of the device; the caching allocator rounds up and splits
NATIVE = 240  # bytes for each voxel of the native images, while a case's files are written
NATIVE_BASE = 40 << 20
CACHED = 12  # bytes for each voxel of the working grid: an image, its labels and its mask
OF_CASE = 64  # bytes for each voxel of the working grid: images, labels, masks, fields, warped images
JUDGED = 10  # images of a pair that a judged refinement holds beside the optimisation, see ``engines.judge``
DRY_STEPS = 8  # of refinement: two on each level, as many as Adam needs to hold all that it holds
DRY_TILES = 2  # of a network on tiles: the others are like the second

Network = Callable[[Tensor], Tensor | Prediction]


class Unpredictable(RuntimeError):
    """An inferer, network or loss needs the values of tensors."""


class Follower(TorchDispatchMode):
    """Counts the bytes of the living storages while operations run; ``peak`` is the largest count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live, self._small, self._small_peak = 0, 0, 0
        self._known: set[int] = set()
        self._some: set[int] = set()  # storages that answer whether there is any

    @property
    def resident(self) -> int:
        """The peak of resident memory on the CPU, with what the C library does not return to the system."""
        return self.peak + int(HEAP_SLACK * self._small_peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # masks are not full, as after an affine stage, and not empty; each structure is there in some pair
            return args[0].untyped_storage()._cdata in self._some if args[0].dtype == torch.bool else 1.0
        mask = _mask_of(func, args)
        if mask is not None and func is torch.ops.aten.index.Tensor:  # of how many is not known: all of them
            out = args[0].new_empty(mask.numel(), *args[0].shape[mask.ndim :])
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        if func is torch.ops.aten.any.default:
            self._some.add(out.untyped_storage()._cdata)
        beside = workspace(func, args, out)
        self.peak = max(self.peak, self._live + beside)
        self._small_peak = max(self._small_peak, self._small + (beside if beside < 2 * HEAP else 0))
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._count(storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._some.discard(key)
        self._count(-size)

    def _count(self, size: int) -> None:
        self._live += size
        self._small += size if abs(size) < HEAP else 0


def workspace(func: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes that torch's convolutions and indexing by a mask take on the CPU beside their result.

    oneDNN reorders what it reads and writes to blocks of 16 channels; small batches go without it, through
    a matrix with a row for each weight of the kernel (the rule is ``use_mkldnn`` in ATen's Convolution.cpp).
    """
    mask = _mask_of(func, args)
    if mask is not None:
        return 8 * mask.ndim * mask.numel()  # the places where it is true
    back = func is torch.ops.aten.convolution_backward.default
    if not back and func is not torch.ops.aten.convolution.default:
        return 0
    result, (x, weight), stride = (args[0], args[1:3], args[4]) if back else (out, args[:2], args[3])
    kernel = weight.shape[2:]
    point = math.prod(kernel) == 1
    large = min(kernel[-2:]) > 3 or len(x) > 1 or math.prod(x.shape[:4]) > 20480
    if x.dtype != torch.float32 or (large and (not point or max(stride) > 1)):
        return _blocked(x) + _blocked(result)
    columns = x.shape[0] * x.shape[1] * math.prod(kernel) * math.prod(result.shape[2:]) * x.element_size()
    return 0 if point else columns * (2 if back else 1)


def _blocked(x: Tensor) -> int:
    channels = x.shape[1] if x.shape[1] < 4 else math.ceil(x.shape[1] / 16) * 16
    return x.numel() // x.shape[1] * channels * x.element_size()


def _mask_of(func: Any, args: Sequence[Any]) -> Tensor | None:
    """The mask by which ``x[mask]`` chooses, or its gradient is put back; None for what is neither."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default) or len(args[1]) > 1:
        return None
    mask: Tensor = args[1][0]
    return mask if mask.dtype == torch.bool else None


def dry_run(work: Callable[[], object]) -> Follower:
    """Run ``work`` without values: the tensors that it makes are fake, and those that it is given must be.

    Raises:
        Unpredictable: it needs values, or an operation that torch does not have without them.
    """
    follower = Follower()
    try:
        with places_anew(), follower:
            work()
    except (RuntimeError, NotImplementedError) as error:  # FakeTensorMode's: they have no class in common
        raise Unpredictable(f"{type(error).__name__}: {error}".partition("\n")[0][:200]) from error
    return follower


def inference(
    inferer: Any, network: Network, shape: Sequence[int], *, device: str | torch.device = "cpu", channels: int = 1
) -> int:
    """Bytes that registering one pair on a grid takes, beyond what the process holds before it.

    Args:
        inferer: ``engines.inferers``'; what it does to the pair is what counts, refinement too.
        network: a module, or any callable that holds one as an attribute.
        shape: voxels of the working grid.
        device: where it will run.
        channels: images of each side.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        dry, network = _without_numbers(inferer), _fake(network)
        judged = JUDGED if getattr(inferer, "refiner", None) is not None else 0
        if hasattr(network, "most"):
            network.most = DRY_TILES

        def work() -> object:
            with torch.no_grad():
                batch = _batch(shape, 1)
                held = [torch.empty_like(batch["fixed_image"]) for _ in range(judged * channels)]
                beside = [torch.empty(1, channels - 1, *shape) for _ in range(2)] if channels > 1 else ()
                pair = torch.cat([batch["fixed_image"], batch["moving_image"]], 1)
                found = dry(pair, network, masks=(batch["fixed_mask"], batch["moving_mask"]), channels=beside)
                # the copies that repairing folds makes: it asks for numbers and cannot run here
                mended = found["displacement"].clone(), found["inverse"].clone()
                return warp_both(batch["moving_image"], batch["fixed_image"], *mended), found, held

        return _of_device(dry_run(work), device)


def training(
    inferer: Any,
    network: nn.Module,
    loss: nn.Module,
    shape: Sequence[int],
    *,
    batch_size: int = 1,
    label_ids: Sequence[int] = (),
    device: str | torch.device = "cpu",
    amp: bool = False,
) -> int:
    """Bytes that training takes, beyond what the process holds with the network made: gradients, Adam's, one step.

    ``label_ids``: the structures that a pair's labels share, for a loss that is given no ``label_ids`` of its own.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, criterion, dry = _fake(network), _fake(loss), _fake(inferer)
        if isinstance(criterion, RegistrationLoss) and not criterion.label_ids:
            criterion.label_ids = tuple(label_ids)

        def work() -> object:
            fake.train()
            states = [torch.zeros_like(p) for p in fake.parameters() if p.requires_grad for _ in range(2)]
            batch = _batch(shape, batch_size)
            if needing(getattr(criterion, "weights", {}), "displacement"):
                batch["displacement"] = torch.empty(batch_size, len(shape), *shape)
            if needing(getattr(criterion, "weights", {}), "clean"):
                batch |= {f"{side}_clean": torch.empty_like(batch[f"{side}_image"]) for side in SIDES}
            pair = torch.cat([batch["fixed_image"], batch["moving_image"]], 1)
            # a network of one channel, too, may be taught by a loss of several
            more = max(channels_of(fake) - 1, len(getattr(criterion, "channels", ())))
            beside = {f"{side}_channels": torch.empty(batch_size, more, *shape) for side in SIDES if more}
            batch |= beside
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                found = dry(pair, fake, **({"channels": [*beside.values()]} if more else {}))
            criterion(found, batch).mean().backward()
            return states, batch

        follower = dry_run(work)
    return _of_device(follower, device) + (BACKWARD if torch.device(device).type == "cpu" else 0)


def native(shape: Sequence[int], grid: Sequence[int] | None = None) -> int:
    """Bytes that writing a registered case's files takes on the CPU: fields in float64 on the larger image's voxels.

    ``grid``: the working grid, where what was registered on it is not held already.
    """
    return NATIVE_BASE + NATIVE * math.prod(shape) + (OF_CASE * math.prod(grid) if grid else 0)


def _batch(shape: Sequence[int], count: int) -> dict[str, Tensor]:
    """A batch as ``data.load`` gives it, without values."""
    types = {"image": torch.float32, "label": torch.int32, "mask": torch.float32}
    sides = [(f"{side}_{kind}", dtype) for side in ("fixed", "moving") for kind, dtype in types.items()]
    return {key: torch.empty(count, 1, *shape, dtype=dtype) for key, dtype in sides}


def _without_numbers(inferer: Any) -> Any:
    """The inferer as a dry run needs it: few steps, no search for folds, no judge."""
    dry = _fake(inferer)  # MONAI's Warp keeps a grid
    dry.repair = False
    if getattr(dry, "refiner", None) is not None:
        dry.refiner.steps, dry.refiner.judged = min(DRY_STEPS, dry.refiner.steps), False
    return dry


def _fake(module: Any) -> Any:
    """A copy whose parameters have no values and take no memory; under a ``FakeTensorMode``."""
    memo: dict[int, Any] = {}
    for part in [module, *getattr(module, "__dict__", {}).values()]:
        part = getattr(part, "network", part)  # of a wrapper within a wrapper
        if isinstance(part, nn.Module):
            memo |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in part.buffers()}
            memo |= {id(p): nn.Parameter(torch.empty(p.shape), p.requires_grad) for p in part.parameters()}
    return copy.deepcopy(module, memo)


def _of_device(follower: Follower, device: str | torch.device) -> int:
    if torch.device(device).type == "cuda":
        context = 0 if torch.cuda.is_initialized() else CUDA_CONTEXT
        return context + int(CUDA_SLACK * follower.peak)
    return LIBRARIES + follower.resident

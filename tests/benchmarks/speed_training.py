"""What a training step costs, where the time goes, and the floor: regpipe's networks and MONAI's VoxelMorph.

    OMP_NUM_THREADS=1 python tests/benchmarks/speed_training.py docs/results/speed_training.csv

Each variant has processes of its own, one after the other in turns, so that what else the machine does hits all alike;
medians over repeats and steps. Same pair, grid, loss, integration, warps and optimiser for all. One thread: processor
seconds. Needs ``fork`` (Linux).
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from regpipe import LoadPair, RegistrationLoss, SymmetricNet, collate_pairs, list_pairs, register, working_grid
from regpipe.engines.inferers import prepare_batch
from regpipe.engines.step import checkpointed
from regpipe.metrics import cost
from regpipe.networks.peers import VoxelMorph
from regpipe.phantoms.cohort import write_cohort

LOSS = {"lncc": 1.0, "diffusion": 0.7, "divergence": 0.1}  # train.yaml's
WINDOW = 7
IMAGE, KERNELS = (2, 64, 34, 34, 34), (64, 64, 3, 3, 3)  # a convolution large enough for the best that there is
PARTS = ("data", "network", "fields", "loss", "back_fields", "back_network", "optimiser")


class Variant(NamedTuple):
    """A network and its switches."""

    network: str
    switch: str = ""  # checkpointing or amp

    @property
    def name(self) -> str:
        return " + ".join(part for part in self if part)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.network == "voxelmorph":
            return VoxelMorph(3)
        return checkpointed(SymmetricNet(3, self.network), self.switch == "checkpointing")


VARIANTS = [Variant(n, s) for s in ("", "checkpointing", "amp") for n in ("resnet18", "vgg16", "alexnet")]
VARIANTS.insert(3, Variant("voxelmorph"))
VARIANTS.append(Variant("voxelmorph", "amp"))


class Clock:
    """Processor and wall seconds by part."""

    def __init__(self) -> None:
        self.processor: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        processor, wall = time.process_time(), time.perf_counter()
        yield
        self.processor[part] = time.process_time() - processor
        self.wall[part] = time.perf_counter() - wall


class Bytes(TorchDispatchMode):
    """Counts what every operator reads and writes, as if nothing stayed in a cache; a view moves nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = {id(x): x for x in tree_leaves([args, kwargs, found]) if isinstance(x, Tensor)}
            self.total += sum(x.nbytes for x in tensors.values())
        return found


class Training:
    """A network with its data, loss and optimiser."""

    def __init__(self, variant: Variant, loader: DataLoader) -> None:
        self.net, self.loader, self.amp = variant.build().train(), loader, variant.switch == "amp"
        self.loss = RegistrationLoss(LOSS, window=WINDOW)
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=5e-4, fused=True)

    def step(self) -> Clock:
        """What ``engines.step.TrainingStep`` does with ``RegistrationInferer``, part by part."""
        clock = Clock()
        with clock("data"):
            pair, target, *_ = prepare_batch(next(iter(self.loader)))
            fixed, moving = pair.chunk(2, 1)
        with clock("network"), torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            velocity = self.net(pair).float()
        with clock("fields"):
            found = register(fixed, moving, velocity)._asdict()
        with clock("loss"):
            loss = self.loss(found, target)
        with clock("back_fields"):
            (gradient,) = torch.autograd.grad(loss, velocity)
        with clock("back_network"):
            velocity.backward(gradient)
        with clock("optimiser"):
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return clock

    def kept(self) -> int:
        """Bytes that the network keeps for its gradient, weights aside."""
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        weights = {p.untyped_storage().data_ptr() for p in self.net.parameters()}
        pair, *_ = prepare_batch(next(iter(self.loader)))
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            velocity = self.net(pair)
        assert velocity.grad_fn is not None  # all of it is still there, so that no two had one place
        return sum(size for place, size in sizes.items() if place not in weights)

    def profile(self) -> str:
        """The operators that take most of a step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            self.step()
        return seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=50)


def measure(variant: Variant, folder: str, side: int, steps: int) -> dict[str, float]:
    """One variant in a process of its own, after a step that is not counted."""
    torch.set_num_threads(1)
    training = Training(variant, loader_of(folder, side))
    before = cost.peak_memory()
    training.step()
    clocks = [training.step() for _ in range(steps)]
    row = {part: statistics.median(clock.processor[part] for clock in clocks) for part in PARTS}
    row["step"] = statistics.median(sum(clock.processor.values()) for clock in clocks)
    row["wall"] = statistics.median(sum(clock.wall.values()) for clock in clocks)
    row["peak_mib"] = (cost.peak_memory() - before) / 2**20
    row["parameters"] = cost.parameters(training.net)
    with FlopCounterMode(display=False) as counted:
        training.step()
    row["gflop"] = counted.get_total_flops() / 1e9
    row["kept_mib"] = training.kept() / 2**20
    with Bytes() as moved:
        training.step()
    row["gbyte"] = moved.total / 1e9
    return row


def loader_of(folder: str, side: int, **told: Any) -> DataLoader:
    """The pairs of a folder in batches of one, as training loads them."""
    cases: Any = list_pairs(folder)
    load = LoadPair(working_grid(cases, shape=[side] * 3), **told)
    loader: DataLoader = DataLoader(cases, collate_fn=lambda items: collate_pairs([load(case) for case in items]))
    next(iter(loader))  # kept from here on
    return loader


def rates() -> dict[str, float]:
    """GFLOP/s of a matrix product and of a convolution, GB/s of a copy, one thread."""
    torch.set_num_threads(1)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        square, image, kernels = (torch.rand(*shape).to(dtype) for shape in ((2048, 2048), IMAGE, KERNELS))
        name = str(dtype).removeprefix("torch.")
        found[f"matrix {name}"] = 2e-9 * 2048**3 / seconds(functools.partial(torch.mm, square, square))
        convolve = functools.partial(nn.functional.conv3d, image, kernels)
        found[f"convolution {name}"] = 2e-9 * convolve().numel() * kernels[0].numel() / seconds(convolve)
    a, b = torch.rand(2, 2**26)
    return found | {"copy": 2e-9 * a.nbytes / seconds(lambda: a.copy_(b))}


def loading(folder: str, side: int) -> dict[str, float]:
    """Processor seconds of a pair: from its files, from another process's ``cache_dir``, from memory."""
    cases, cache = list_pairs(folder), f"{folder}/cache"
    grid = working_grid(cases, shape=[side] * 3)
    LoadPair(grid, cache_dir=cache)(cases[0])
    stored, kept = LoadPair(grid, cache_dir=cache), LoadPair(grid)
    kept(cases[0])
    return {
        "files": seconds(lambda: LoadPair(grid, cache=False)(cases[0])),
        "cache_dir": seconds(lambda: collate_pairs([stored(cases[0])]), repeats=1),
        "memory": seconds(lambda: collate_pairs([kept(cases[0])])),
    }


def seconds(work: Callable[[], Any], *, repeats: int = 3) -> float:
    """Median processor seconds."""

    def once() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return statistics.median(once() for _ in range(repeats))


def alone(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """In a process of its own, so that memory is its own too."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def with_floor(variant: Variant, row: dict[str, float], rate: dict[str, float]) -> dict[str, Any]:
    """The least that these operations could take here: their multiplications at the better rate of the two, and their
    reading and writing at a copy's."""
    dtype = "bfloat16" if variant.switch == "amp" else "float32"
    flops = row["gflop"] / max(rate[f"matrix {dtype}"], rate[f"convolution {dtype}"])
    return {"variant": variant.name, **row, "floor_flops": flops, "floor_bytes": row["gbyte"] / rate["copy"]}


SHOWN: dict[str, tuple[str, int]] = {
    "step": ("step", 2),
    "wall": ("wall", 2),
    "peak_mib": ("peak, MiB", 0),
    "kept_mib": ("kept, MiB", 0),
    "data": ("data", 4),
    "network": ("network", 2),
    "fields": ("integrate, warp", 2),
    "loss": ("loss", 2),
    "back_fields": ("back: loss, fields", 2),
    "back_network": ("back: network", 2),
    "optimiser": ("optimiser", 3),
    "floor_flops": ("floor: FLOP", 2),
    "floor_bytes": ("floor: bytes", 2),
}


def table(rows: list[dict[str, Any]]) -> str:
    head = ["", *(title for title, _ in SHOWN.values()), "of VoxelMorph's step"]
    peer = next(row["step"] for row in rows if row["variant"] == "voxelmorph")
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [f"{row[key]:.{digits}f}" for key, (_, digits) in SHOWN.items()]
        lines.append([row["variant"], *cells, f"{row['step'] / peer:.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show_profile(variant: Variant, side: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(Path(folder), shape=(side,) * 3, n_pairs=1)
        training = Training(variant, loader_of(folder, side))
        training.step()
        print(training.profile())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the CSV file to write")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[variant.name for variant in VARIANTS])
    parser.add_argument("--profile", choices=[variant.name for variant in VARIANTS], help="show its operators instead")
    told = parser.parse_args()
    if told.profile:
        return show_profile(next(variant for variant in VARIANTS if variant.name == told.profile), told.side)
    variants = [variant for variant in VARIANTS if variant.name in (*told.only, "voxelmorph")]
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ("rates", "loading", *(v.name for v in variants))}
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(Path(folder), shape=(told.side,) * 3, n_pairs=1)
        for _ in range(told.repeats):
            seen["rates"].append(alone(rates))
            seen["loading"].append(alone(loading, folder, told.side))
            for variant in variants:
                seen[variant.name].append(alone(measure, variant, folder, told.side, told.steps))
    found, rate = {name: medians(rows) for name, rows in seen.items()}, medians(seen["rates"])
    rows = [with_floor(variant, found[variant.name], rate) for variant in variants]
    with told.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(table(rows))
    print("\nrates, GFLOP/s and GB/s:", {key: round(value, 1) for key, value in rate.items()})
    print("a pair's loading, processor s:", {key: round(value, 5) for key, value in found["loading"].items()})


if __name__ == "__main__":
    main()

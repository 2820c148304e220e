"""Processor seconds, wall-clock seconds and memory of regpipe's parts, as ratios to a named reference in the same run.

    python tests/benchmarks/speed.py lncc fields inference layers refinement [-o docs/results] [--shape 160,192,224]

Each measurement is a process of its own; the variants of a part take turns, ``--repeats`` times, and medians are
reported. ``GiB`` is what the part adds to the peak of a process that holds its inputs already. Weights are random:
they change no cost. ``speed.csv`` keeps every single measurement.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.losses import LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import DVF2DDF, Warp
from torch import Tensor

from regpipe.engines.inferers import RegistrationInferer
from regpipe.engines.refine import Refiner, refinement_loss
from regpipe.fields.algebra import LAYERS, Layers, integrate_both, register, resize
from regpipe.losses.lncc import lncc
from regpipe.losses.loss import RegistrationLoss
from regpipe.metrics.cost import peak_memory
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.symnet import SymNet

Work = Callable[[], object]
STEPS = 50  # of refinement
COLUMNS = ("part", "variant", "shape", "threads", "cpu_seconds", "seconds", "gib")


def smooth(channels: int, shape: Sequence[int], *, seed: int) -> Tensor:
    """Noise on a grid sixteen times coarser, (1, channels, *shape)."""
    noise = torch.rand(1, channels, *(n // 16 for n in shape), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=True)


def images(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return smooth(1, shape, seed=0), smooth(1, shape, seed=1)


def velocity_of(shape: Sequence[int]) -> Tensor:
    """Up to 4 voxels of ``shape`` along each axis."""
    return 8 * (smooth(3, shape, seed=2) - 0.5)


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int]) -> Work:
    a, b = images(shape)
    a.requires_grad_()
    return lambda: loss(a, b).backward()


def monais() -> Layers:
    """MONAI's own layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Layers(warp=Warp(padding_mode="border"), dvf2ddf=DVF2DDF(7, padding_mode="border"))


def transported(shape: Sequence[int], *, stride: int, ours: bool) -> Work:
    """exp(v), exp(-v) and both warps, with gradients, the velocity at a resolution."""
    fixed, moving = images(shape)
    grid = tuple((n - 1) // stride + 1 for n in shape)
    velocity = resize(velocity_of(shape), grid).requires_grad_()
    puller, block = monais()

    def monai() -> None:
        u, back = resize(block(velocity), shape), resize(block(-velocity), shape)
        (puller(moving, u).mean() + puller(fixed, back).mean()).backward()

    def regpipe() -> None:
        result = register(fixed, moving, velocity)
        (result.warped_moving.mean() + result.warped_fixed.mean()).backward()

    return regpipe if ours else monai


def inferred(shape: Sequence[int], backbone: str, *, within: Layers = LAYERS, after: Layers = LAYERS) -> Work:
    """A pair registered, by layers of the network's levels and by those that integrate and warp at the end."""
    fixed, moving = images(shape)
    torch.manual_seed(0)
    symnet = backbone == "symnet"
    network = (SymNet(3) if symnet else SymmetricNet(3, backbone, layers=within)).eval()
    inferer = RegistrationInferer(layers=after)

    def work() -> None:
        with torch.no_grad():
            inferer(torch.cat([fixed, moving], 1), network)

    return work


def refined(shape: Sequence[int]) -> Work:
    fixed, moving = images(shape)
    refiner = Refiner(RegistrationLoss(refinement_loss("lncc"), window=5), steps=STEPS)
    velocity = torch.zeros(1, 3, *((n - 1) // 2 + 1 for n in shape))
    return lambda: refiner(fixed, moving, velocity)


PARTS: dict[str, dict[str, Callable[[Sequence[int]], Work]]] = {  # the first variant is the reference
    "lncc": {
        "MONAI": lambda s: with_gradient(LocalNormalizedCrossCorrelationLoss(3, kernel_size=9), s),
        "regpipe": lambda s: with_gradient(lambda a, b: lncc(a, b, window=9), s),
    },
    "fields": {
        "regpipe, full resolution": lambda s: transported(s, stride=1, ours=True),
        "regpipe, half resolution": lambda s: transported(s, stride=2, ours=True),
        "MONAI, full resolution": lambda s: transported(s, stride=1, ours=False),
        "MONAI, half resolution": lambda s: transported(s, stride=2, ours=False),
    },
    "inference": {
        name: lambda s, name=name: inferred(s, name)  # type: ignore[misc]
        for name in ("symnet", "resnet18", "alexnet", "vgg16")
    },
    "layers": {  # a bundle names one pair of them for both
        "regpipe": lambda s: inferred(s, "resnet18"),
        "MONAI after the network": lambda s: inferred(s, "resnet18", after=monais()),
        "MONAI in its levels": lambda s: inferred(s, "resnet18", within=monais()),
        "MONAI in both": lambda s: inferred(s, "resnet18", within=monais(), after=monais()),
    },
    "refinement": {"resnet18 alone": lambda s: inferred(s, "resnet18"), f"{STEPS} steps": refined},
}


def peak() -> float:
    return peak_memory() / 2**30


def once(part: str, variant: str, shape: Sequence[int]) -> dict[str, float]:
    """What one run costs, in this process."""
    work, before = PARTS[part][variant](shape), peak()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall, "gib": peak() - before}


def apart(part: str, variant: str, shape: Sequence[int]) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", part, variant, "--shape", ",".join(map(str, shape))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def agreement(shape: Sequence[int]) -> str:
    """How far the displacement of a half-resolution velocity is from that of the full one, voxels."""
    full = velocity_of(shape)
    half = integrate_both(resize(full, [(n - 1) // 2 + 1 for n in shape]))
    apart = [resize(a, shape) - b for a, b in zip(half, integrate_both(full), strict=True)]
    distance = torch.cat(apart).square().sum(1).sqrt()
    return f"half against full resolution: mean {distance.mean():.4f}, largest {distance.max():.4f} voxels"


def table(rows: Sequence[dict[str, str | float]], part: str) -> str:
    lines = [
        "| part | variant | processor s | of reference | s | GiB | of reference |",
        "|---|---|---|---|---|---|---|",
    ]
    variants = list(PARTS[part])

    def median(variant: str, column: str) -> float:
        return statistics.median(float(r[column]) for r in rows if (r["part"], r["variant"]) == (part, variant))

    for variant in variants:
        cpu, wall, gib = (median(variant, column) for column in ("cpu_seconds", "seconds", "gib"))
        of_cpu, of_gib = cpu / median(variants[0], "cpu_seconds"), gib / median(variants[0], "gib")
        lines.append(f"| {part} | {variant} | {cpu:.2f} | {of_cpu:.2f} | {wall:.2f} | {gib:.2f} | {of_gib:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--shape", type=lambda text: [int(n) for n in text.split(",")], default=[160, 192, 224])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--once", nargs=2, metavar=("PART", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    if options.once:
        part, variant = options.once
        print(json.dumps(once(part, variant, options.shape)))
        return
    file, threads = options.out / "speed.csv", os.environ.get("OMP_NUM_THREADS", "")
    kept: list[dict[str, str | float]] = []
    if file.is_file():
        kept = [row for row in csv.DictReader(file.open()) if row["part"] not in options.parts]
    for part in options.parts:
        rows: list[dict[str, str | float]] = []
        for _ in range(options.repeats):
            for variant in PARTS[part]:
                about = {"part": part, "variant": variant, "shape": "x".join(map(str, options.shape))}
                rows.append({**about, "threads": threads, **apart(part, variant, options.shape)})
        kept += rows
        print(table(rows, part), flush=True)
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
    if "fields" in options.parts:
        print(agreement(options.shape))


if __name__ == "__main__":
    main()

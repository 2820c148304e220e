"""The real pairs that a shipped network is measured on: a dict of sets, each a function that lists its pairs.

A pair is read only when it is asked for. Its images are on the fixed image's own grid (``LoadPair(None)``), but for the
two sets that are made of single images: a brain's ultrasound moved by a known field, and images laid onto themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
import ultrasound
from judging import SPLIT_DICE
from sets import choices, open_data
from torch import Tensor

from regpipe import LoadPair, collate_pairs, list_pairs
from regpipe.data.pairs import Case
from regpipe.io.images import Grid

HIPPOCAMPI, HEADS, FRAMES, FIELDS = 40, 6, 20, 3  # pairs of the set
FARTHEST = 8.0  # voxels: what the known fields move at most
NOISE = (0.02, 0.05)  # of the images laid onto themselves: standard deviation as a share of the intensity range

FIELD = ("folds_percent", "ndv_percent", "sdlogj")
OVERLAP = ("dice_before", "dice", "hd95_before", "hd95")
LANDMARKS = ("tre_before", "tre")
ALIKE = ("ncc_before", "ncc", "ncc_rose", "lncc_before", "lncc", "lncc_rose")
TRUTH = ("error_before", "error")
STILL = ("moved_mean", "moved_p95")


class Loaded(NamedTuple):
    """A collated batch of one and its grid; the true ``displacement`` is in the batch where there is one."""

    batch: dict[str, Any]
    grid: Grid


class RealPair(NamedTuple):
    name: str
    load: Callable[[], Loaded]


class Folders(NamedTuple):
    """Where the sets are, and where alignments are kept, which take longer than what comes after."""

    data: Path
    kept: Path


class RealSet(NamedTuple):
    pairs: Callable[[Folders], list[RealPair]]
    metrics: tuple[str, ...]  # that count


# ---- pairs of files


def from_files(
    cases: Sequence[Case], stage: str, *, landmark_channels: int | None = None, kept: Path | None = None
) -> list[RealPair]:
    folder = str(kept) if kept and stage == "affine" else None
    load = LoadPair(None, landmark_channels=landmark_channels, affine=stage, cache=False, cache_dir=folder)
    return [RealPair(case["case"], functools.partial(_load, load, case)) for case in cases]


def _load(load: LoadPair, case: Case) -> Loaded:
    return Loaded(collate_pairs([load(case)]), load.grid_of(case))


def hippocampus(at: Folders, stage: str) -> list[RealPair]:
    """The pairs of docs/results/accuracy.md: 40 of those of the 40 subjects held out there."""
    held = open_data(at.data / "hippocampus_mr", choices("hippocampus_mr"), HIPPOCAMPI)
    return from_files(held.cases, stage, kept=at.kept)


def slices(at: Folders) -> list[RealPair]:
    return from_files(list_pairs(at.data / "brain_mr_2d"), "none")


def heads(at: Folders) -> list[RealPair]:
    """The six of docs/results/accuracy.md."""
    return from_files(open_data(at.data / "brain_mr_3d", choices("brain_mr_3d"), HEADS).cases, "none")


def prostates(at: Folders, stage: str) -> list[RealPair]:
    """The 18 of docs/results/accuracy.md."""
    held = open_data(at.data / "prostate_mrus", choices("prostate_mrus"), None)
    return from_files(held.cases, stage, landmark_channels=held.landmark_channels, kept=at.kept)


def liver(at: Folders) -> list[RealPair]:
    cases = list_pairs(at.data / "ultrasound_2d" / "liver", pairing="first")
    spread = np.linspace(0, len(cases) - 1, min(FRAMES, len(cases))).round().astype(int)
    return from_files([cases[i] for i in spread], "none")


def echo(at: Folders) -> list[RealPair]:
    film = at.data / "ultrasound_3d" / "tee_4d.nii.gz"
    frames = range(1, nib.load(film).shape[3])  # type: ignore[attr-defined]
    first = {"fixed_image": f"{film}#0"}
    return from_files([{"case": f"frame_{i}", **first, "moving_image": f"{film}#{i}"} for i in frames], "none")


# ---- pairs made of one image


def batch_of(fixed: Tensor, moving: Tensor) -> Loaded:
    """Two images (1, 1, *S) as a batch without labels and landmarks, voxels of 1 mm."""
    shape = tuple(fixed.shape[2:])
    batch: dict[str, Any] = {"fixed_image": fixed, "moving_image": moving}
    for side in ("fixed", "moving"):
        batch[f"{side}_label"] = torch.zeros(fixed.shape, dtype=torch.int32)
        batch[f"{side}_landmarks"] = torch.zeros(1, 0, len(shape))
    return Loaded(batch, Grid(shape, (1.0,) * len(shape)))


def known_fields(at: Folders) -> list[RealPair]:
    return [RealPair(f"field_{seed}", functools.partial(_known_field, at.data, seed)) for seed in range(FIELDS)]


def _known_field(data: Path, seed: int) -> Loaded:
    generator = torch.Generator().manual_seed(seed)
    fixed = ultrasound.reduced_brain(data, 2)  # 128 x 128 x 144
    velocity = ultrasound.smooth_velocity(fixed.shape[2:], generator)
    velocity = velocity * FARTHEST / velocity.norm(dim=1).max()  # nothing goes faster, so nothing farther
    moving, there = ultrasound.moved(fixed, velocity, generator)
    batch, grid = batch_of(fixed, moving)
    return Loaded({**batch, "displacement": there}, grid)


def restraint(at: Folders, dims: int) -> list[RealPair]:
    """Two images of each of three sets against themselves, each time with fresh noise."""
    return [
        RealPair(f"{name}_noise_{100 * sigma:.0f}", functools.partial(_twice, read, sigma))
        for name, read in STILLS[dims](at.data).items()
        for sigma in NOISE
    ]


def _twice(read: Callable[[], Tensor], sigma: float) -> Loaded:
    image, generator = read(), torch.Generator().manual_seed(0)
    return batch_of(*(rician(image, sigma, generator) for _ in range(2)))


def rician(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """The magnitude of a complex image with noise in both parts, as MR has it; in [0, 1]."""
    real, imaginary = (sigma * torch.randn(image.shape, generator=generator) for _ in range(2))
    return torch.hypot(image + real, imaginary).clamp(max=1)


Reader = Callable[[], Tensor]


def stills_2d(data: Path) -> dict[str, Reader]:
    """Slices of two heads, two frames of the liver and slices through the middle of two chests."""
    heads, frames = _two(data / "brain_mr_2d" / "images"), _two(data / "ultrasound_2d" / "liver")
    chests = [data / "lung_ct" / f"{name}.nii.gz" for name in ("baseline", "followup")]
    readers: dict[str, Reader] = {name_of(path): functools.partial(ultrasound.tensor, path) for path in heads + frames}
    return readers | {name_of(path): functools.partial(_middle_slice, path) for path in chests}


def _middle_slice(path: Path) -> Tensor:
    volume = ultrasound.tensor(path)
    return volume[..., volume.shape[-1] // 2]


def stills_3d(data: Path) -> dict[str, Reader]:
    """Two hippocampi, two heads and two frames of the echo."""
    film = data / "ultrasound_3d" / "tee_4d.nii.gz"
    paths = [path for name in ("hippocampus_mr", "brain_mr_3d") for path in _two(data / name / "images")]
    paths += [film.with_name(f"{film.name}#{i}") for i in (0, 3)]
    return {name_of(path): functools.partial(ultrasound.tensor, path) for path in paths}


def _two(folder: Path) -> list[Path]:
    """The first image of a folder and the one in the middle."""
    files = sorted(folder.iterdir())
    return [files[0], files[len(files) // 2]]


def name_of(path: Path) -> str:
    return path.name.replace(".nii.gz", "").replace(".png", "").replace("#", "_")


STILLS = {2: stills_2d, 3: stills_3d}

# ---- the sets, by dimension


SETS: dict[int, dict[str, RealSet]] = {
    2: {
        "brain_mr_2d": RealSet(slices, OVERLAP + FIELD),
        "liver": RealSet(liver, ALIKE + FIELD),
        "restraint": RealSet(functools.partial(restraint, dims=2), STILL + FIELD),
    },
    3: {
        "hippocampus_mr_centre": RealSet(functools.partial(hippocampus, stage="centre"), OVERLAP + FIELD),
        "hippocampus_mr_affine": RealSet(functools.partial(hippocampus, stage="affine"), OVERLAP + FIELD),
        "brain_mr_3d": RealSet(heads, OVERLAP + SPLIT_DICE + FIELD),
        "echo": RealSet(echo, ALIKE + FIELD),
        "known_field": RealSet(known_fields, TRUTH + FIELD),
        "prostate_mrus_centre": RealSet(functools.partial(prostates, stage="centre"), OVERLAP + LANDMARKS + FIELD),
        "prostate_mrus_affine": RealSet(functools.partial(prostates, stage="affine"), OVERLAP + LANDMARKS + FIELD),
        "restraint": RealSet(functools.partial(restraint, dims=3), STILL + FIELD),
    },
}

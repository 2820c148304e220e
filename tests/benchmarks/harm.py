"""Pairs with nothing to find: what does the deformation add to an alignment that is right?

    python tests/benchmarks/harm.py -o harm.csv [--kinds slice liver] [--noise 0.02] [--answers zero syn_cc]

An image of each kind against itself, each time with fresh noise of its modality: as it is (``none``), or moved rigidly
by a cubic spline and brought back linearly, as an affine stage does (``moved``). ``contrast``: the moving image as it
is, turned round whole or in its tissue only, with a bias field, or with a lesion of a tenth of its side. The true
displacement is 0, so that its length is the error, in voxels, within the image's own tissue. Lines that are there are
not done again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
import ultrasound
from realpairs import rician
from scipy import ndimage
from tables import kept_rows, write_rows
from torch import Tensor

from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.pyramid import coarsen
from regpipe.engines.refine import zero_refiner
from regpipe.metrics.measures import bootstrap_interval, folds_percent, sdlogj

Reader = Callable[[Path], list[Tensor]]
Noise = Callable[[Tensor, float, torch.Generator], Tensor]
COLUMNS = ("kind", "image", "motion", "contrast", "noise", "answer", "mean", "p95", "sdlogj", "folds_percent")
IMAGES = 4  # of each kind, where there are so many


def _gaussian(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return (image + sigma * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def _speckle(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Multiplicative: of ``sigma`` where the image is in the middle of its range."""
    return (image * (1 + 2 * sigma * torch.randn(image.shape, generator=generator))).clamp(0, 1)


def _spread(data: Path, pattern: str) -> list[Tensor]:
    files = sorted(data.glob(pattern))
    places = np.linspace(0, len(files) - 1, min(IMAGES, len(files))).round().astype(int)
    return [ultrasound.tensor(files[i]) for i in places]


def _coarse(images: Sequence[Tensor], factor: int) -> list[Tensor]:
    return [coarsen(image, [n // factor for n in image.shape[2:]]) for image in images]


def _echo(data: Path) -> list[Tensor]:
    film = data / "ultrasound_3d" / "tee_4d.nii.gz"
    return [ultrasound.tensor(film.with_name(f"{film.name}#{i}")) for i in (0, 2, 4, 6)]


def _sector(image: Tensor) -> Tensor:
    """A frame without the grey screen around its sector, whose marks and lines are no tissue."""
    flat = (image[0, 0] - image[0, 0, -1, -1]).abs() < 0.08
    parts, _ = ndimage.label(ndimage.binary_opening(flat.numpy(), iterations=3))
    screen = ndimage.binary_dilation(np.isin(parts, [parts[i, j] for i in (5, -6) for j in (5, -6)]), iterations=6)
    return image * torch.from_numpy(~screen)


KINDS: dict[str, tuple[Reader, Noise]] = {
    "slice": (lambda data: _spread(data, "brain_mr_2d/images/*"), rician),
    "liver": (lambda data: [_sector(x) for x in _spread(data, "ultrasound_2d/liver/*.png")], _speckle),
    "hippocampus": (lambda data: _spread(data, "hippocampus_mr/images/*"), rician),
    "head_4mm": (lambda data: _coarse(_spread(data, "brain_mr_3d/images/*"), 4), rician),
    "lung": (lambda data: _coarse(_spread(data, "lung_ct/*line.nii.gz"), 2), _gaussian),
    "echo": (lambda data: _coarse(_echo(data), 2), _speckle),
    "prostate": (lambda data: _coarse(_spread(data, "prostate_mrus/moving_images/*"), 2), rician),
    "head": (lambda data: _spread(data, "brain_mr_3d/images/*"), rician),  # 1 mm: minutes each
}


def _turned(image: Tensor) -> Tensor:
    return (1 - image) ** 0.7


def _tissue(image: Tensor) -> Tensor:
    """Turned round in what is not background, whose rim becomes bright: a relation that no line explains, as of T2."""
    return torch.where(image > 0.05, 1 - 0.9 * image, image)


def _biased(image: Tensor) -> Tensor:
    line = torch.linspace(0.75, 1.25, image.shape[2]).view(1, 1, -1, *[1] * (image.ndim - 3))
    return (image * line).clamp(max=1)


def _lesion(image: Tensor) -> Tensor:
    """A bright ball beside the middle, of a tenth of the shortest side."""
    shape = image.shape[2:]
    places = torch.meshgrid(*(torch.arange(n) - 0.42 * n for n in shape), indexing="ij")
    distance = sum(x.square() for x in places) ** 0.5
    return torch.where(distance < min(shape) / 10, 0.9, image)


CONTRASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda image: image,
    "turned": _turned,
    "tissue": _tissue,
    "bias": _biased,
    "lesion": _lesion,
}


def _moved(image: Tensor, noisy: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Turned by 5 degrees and shifted by broken voxels, then noise, then brought back by one linear interpolation.

    And where that has stayed in sight.
    """
    dim, angle = image.ndim - 2, np.deg2rad(5)
    matrix = np.eye(dim)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    middle, shift = (np.array(image.shape[2:]) - 1) / 2, np.array([1.3, -0.7, 0.4])[:dim]

    def turned(x: Tensor, turn: np.ndarray, offset: np.ndarray, order: int) -> Tensor:
        mode = "nearest" if order > 1 else "constant"  # a spline that falls to 0 at the rim rings within
        found = ndimage.affine_transform(x[0, 0].numpy(), turn, offset, order=order, mode=mode)
        return torch.from_numpy(found)[None, None]

    away, home = (matrix, middle + shift - matrix @ middle), (matrix.T, middle - matrix.T @ (middle + shift))
    seen = turned(turned(torch.ones_like(image), *away, 1), *home, 1)
    return turned(noisy(turned(image, *away, 3).clamp(0, 1)), *home, 1), (seen > 0.999).float()


def pair_of(image: Tensor, noise: Noise, sigma: float, motion: str, contrast: str) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed, moving and where moving is known, (1, 1, *S)."""
    generator = torch.Generator().manual_seed(0)

    def noisy(clean: Tensor) -> Tensor:
        return noise(clean, sigma, generator)

    fixed, other = noisy(image), CONTRASTS[contrast](image)
    moving, seen = _moved(other, noisy) if motion == "moved" else (noisy(other), torch.ones_like(image))
    return fixed, moving, seen


def _from_zero(similarity: str, fixed: Tensor, moving: Tensor, seen: Tensor) -> Tensor:
    with torch.no_grad():
        inferer = ZeroInferer(zero_refiner(similarity), repair=True)
        masks = (torch.ones_like(seen), seen)
        return inferer(torch.cat([fixed, moving], 1), torch.nn.Identity(), masks=masks)["displacement"][0]


def _of_peer(method: str, fixed: Tensor, moving: Tensor, seen: Tensor) -> Tensor:
    # ConvexAdam's masks end in an IndexError on odd sizes, elastix's in an error on volumes
    everywhere = bool(seen.all()) or method == "convexadam" or (method == "elastix" and fixed.ndim == 5)
    masks = (None, None) if everywhere else (np.ones(seen.shape[2:], np.float32), seen[0, 0].numpy())
    pair = peers.Pair(fixed[0, 0].numpy(), moving[0, 0].numpy(), (1.0,) * (fixed.ndim - 2), *masks)
    return torch.from_numpy(peers.run(method, pair, peers.Place())[0].displacement)


def answer_of(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``zero``, ``zero:mi`` and the like: regpipe without a network; else one of ``peers.METHODS``."""
    own, _, similarity = name.partition(":")
    return functools.partial(_from_zero, similarity or "lncc") if own == "zero" else functools.partial(_of_peer, name)


def row(image: Tensor, u: Tensor) -> dict[str, Any]:
    error = u.norm(dim=0)[image[0, 0] > 0.05].numpy()
    return {
        "mean": error.mean(),
        "p95": np.percentile(error, 95),
        "sdlogj": sdlogj(u),
        "folds_percent": folds_percent(u),
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each kind, motion, contrast and noise; the mean error of each answer, over images."""
    answers = list(dict.fromkeys(r["answer"] for r in rows))
    lines = [f"| pair | {' | '.join(answers)} |", "|---" * (len(answers) + 1) + "|"]
    for key, group in itertools.groupby(sorted(rows, key=_key), _key):
        held = list(group)
        cells = [[float(r["mean"]) for r in held if r["answer"] == name] for name in answers]
        p95 = [[float(r["p95"]) for r in held if r["answer"] == name] for name in answers]
        shown = [f"{np.mean(a):.3f} / {np.mean(b):.3f}" if a else "" for a, b in zip(cells, p95, strict=True)]
        lines.append(f"| {', '.join(key)} | {' | '.join(shown)} |")
    for name in answers:
        mean, low, high = bootstrap_interval([float(r["mean"]) for r in rows if r["answer"] == name])
        lines.append(f"\n{name}: mean error of all {mean:.3f} voxels, 95 % interval {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def _key(r: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(r[name]) for name in ("kind", "motion", "contrast", "noise"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REGPIPE_DATA", "../shared/data")))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[k for k in KINDS if k != "head"])
    parser.add_argument("--motion", nargs="+", choices=("none", "moved"), default=["none", "moved"])
    parser.add_argument("--contrast", nargs="+", choices=CONTRASTS, default=list(CONTRASTS))
    parser.add_argument("--noise", nargs="+", type=float, default=[0.01, 0.02, 0.05, 0.1], help="of the range")
    parser.add_argument("--answers", nargs="+", default=["zero"])
    parser.add_argument("-o", "--out", type=Path, default=Path("harm.csv"))
    o = parser.parse_args()
    rows = kept_rows(o.out)
    done = {tuple(r[c] for c in COLUMNS[:6]) for r in rows}
    for kind in o.kinds:
        read, noise = KINDS[kind]
        for i, image in enumerate(read(o.data)):
            for motion, contrast, sigma, name in itertools.product(o.motion, o.contrast, o.noise, o.answers):
                what = dict(zip(COLUMNS[:6], (kind, str(i), motion, contrast, str(sigma), name), strict=True))
                if tuple(what.values()) in done:
                    continue
                found = answer_of(name)(*pair_of(image, noise, sigma, motion, contrast))
                rows.append(what | row(image, found))
                print(" ".join(map(str, what.values())), *(f"{rows[-1][c]:.3f}" for c in COLUMNS[6:]), flush=True)
                write_rows(o.out, COLUMNS, rows)
    print(summary(rows))


if __name__ == "__main__":
    main()

"""Which similarity for which contrast: real pairs whose moving image's contrast is changed, refined from zero by each.

    python tests/benchmarks/contrasts.py -o contrasts.csv [--sets brain_mr_2d] [--answers auto lncc mind mi]

Sets are pairs after the affine stage (``realpairs.SETS``), and ``known_2d``: slices moved by a known field, with noise.
``dice`` is of nearest-neighbour labels, ``tre`` in mm, ``error`` the mean distance to the known field in voxels.
Lines that are there are not done again.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import ultrasound
from judging import judge
from peers import Field
from realpairs import SETS, Folders, Loaded, RealPair, batch_of, rician
from tables import kept_rows, write_rows
from torch import Tensor

from regpipe.engines.inferers import ZeroInferer, prepare_batch
from regpipe.engines.refine import zero_refiner

MEASURES = ("dice_before", "dice", "tre_before", "tre", "error_before", "error", "sdlogj", "folds_percent")
COLUMNS = ("set", "pair", "contrast", "answer", "chose", "seconds", *MEASURES)
PAIRS = {"brain_mr_2d": 14, "hippocampus_mr_affine": 8, "prostate_mrus_centre": 6, "known_2d": 4}
FARTHEST, NOISE = 6.0, 0.02  # of the known fields, voxels; of the range


def _t2(image: Tensor) -> Tensor:
    """Of a T1 image: what is dark in the tissue bright, what is bright dark; the background stays."""
    knots = np.array([0.0, 0.05, 0.2, 0.45, 0.75, 1.0]), np.array([0.0, 0.1, 0.95, 0.6, 0.35, 0.25])
    return torch.from_numpy(np.interp(image.numpy(), *knots).astype(np.float32))


CONTRASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda image: image,
    "turned": lambda image: (1 - image) ** 0.7,
    "gamma": lambda image: image**2.5,
    "t2": _t2,
}


def known_2d(at: Folders) -> list[RealPair]:
    files = sorted((at.data / "brain_mr_2d" / "images").iterdir())
    return [RealPair(f"known_{i}", functools.partial(_known, files[i], i)) for i in range(PAIRS["known_2d"])]


def _known(path: Path, seed: int) -> Loaded:
    generator = torch.Generator().manual_seed(seed)
    fixed = ultrasound.tensor(path)
    velocity = ultrasound.smooth_velocity(fixed.shape[2:], generator)
    velocity = velocity * FARTHEST / velocity.norm(dim=1).max()
    moving, there = ultrasound.moved(fixed, velocity, generator)
    batch, grid = batch_of(fixed, moving)
    return Loaded({**batch, "displacement": there}, grid)


def pairs_of(name: str, at: Folders) -> list[RealPair]:
    found = known_2d(at) if name == "known_2d" else SETS[2 if name.endswith("2d") else 3][name].pairs(at)
    return [found[i] for i in np.linspace(0, len(found) - 1, min(PAIRS[name], len(found))).round().astype(int)]


def seen_of(pair: Loaded, contrast: str, *, noisy: bool) -> dict[str, Any]:
    """The batch, with the moving image's contrast changed; then noise in both where the pair is made of one image."""
    generator = torch.Generator().manual_seed(1)
    seen = dict(pair.batch) | {"moving_image": CONTRASTS[contrast](pair.batch["moving_image"])}
    if noisy:
        seen |= {f"{side}_image": rician(seen[f"{side}_image"], NOISE, generator) for side in ("fixed", "moving")}
    return seen


@torch.no_grad()
def register(similarity: str, batch: dict[str, Any]) -> tuple[Field, str, float]:
    kind, _, looks = similarity.partition(" ")  # "features vgg16:FILE"
    inferer = ZeroInferer(zero_refiner(kind, features=looks or None), repair=True)
    images, _, _, told = prepare_batch(batch)
    began = time.process_time()
    found = inferer(images, torch.nn.Identity(), **told)
    seconds = time.process_time() - began
    chose = found["contrast"][0]
    return Field(*(found[name][0].numpy() for name in ("displacement", "inverse"))), chose, seconds


def row(field: Field, pair: Loaded) -> dict[str, Any]:
    found = {name: value for name, value in judge(field, pair.batch, pair.grid.spacing).items() if name in MEASURES}
    if "displacement" in pair.batch:
        truth, inside = pair.batch["displacement"][0], pair.batch["fixed_image"][0, 0] > 0.05
        for name, u in (("error_before", 0 * truth), ("error", torch.from_numpy(field.displacement))):
            found[name] = float((u - truth).norm(dim=0)[inside].mean())
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each set and contrast: the mean of what tells there, of each answer."""
    answers = list(dict.fromkeys(r["answer"] for r in rows))
    lines = [f"| pairs | measure | {' | '.join(answers)} | auto chose |", "|---" * (len(answers) + 3) + "|"]
    for where in dict.fromkeys((r["set"], r["contrast"]) for r in rows):
        held = [r for r in rows if (r["set"], r["contrast"]) == where]
        for measure in ("dice", "tre", "error", "sdlogj"):
            cells = [[float(r[measure]) for r in held if r["answer"] == a and r.get(measure)] for a in answers]
            if any(np.isfinite(c).any() for c in map(np.array, cells) if len(c)):
                shown = " | ".join(f"{np.nanmean(c):.4f}" if c else "" for c in cells)
                chose = [r["chose"] for r in held if r["answer"] == "auto"]
                counts = ", ".join(f"{name} {chose.count(name)}" for name in sorted(set(chose)))
                lines.append(f"| {', '.join(where)} | {measure} | {shown} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REGPIPE_DATA", "../shared/data")))
    parser.add_argument("--sets", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--contrasts", nargs="+", choices=CONTRASTS, default=list(CONTRASTS))
    parser.add_argument("--answers", nargs="+", default=["auto", "lncc", "mind", "mi"])
    parser.add_argument("--pairs", type=int, help="the first so many of each set's draw")
    parser.add_argument("-o", "--out", type=Path, default=Path("contrasts.csv"))
    o = parser.parse_args()
    rows = kept_rows(o.out)
    done = {tuple(r[c] for c in COLUMNS[:4]) for r in rows}
    for name in o.sets:
        for pair in pairs_of(name, Folders(o.data, o.out.parent / "aligned"))[: o.pairs]:
            for contrast in o.contrasts:
                for answer in o.answers:
                    what = dict(zip(COLUMNS[:4], (name, pair.name, contrast, answer), strict=True))
                    if tuple(what.values()) in done:
                        continue
                    loaded = pair.load()
                    field, chose, seconds = register(answer, seen_of(loaded, contrast, noisy=name == "known_2d"))
                    rows.append(what | {"chose": chose, "seconds": f"{seconds:.2f}"} | row(field, loaded))
                    print(
                        " ".join(what.values()),
                        chose,
                        {k: round(float(v), 3) for k, v in rows[-1].items() if k in MEASURES},
                        flush=True,
                    )
                    write_rows(o.out, COLUMNS, rows)
    print(summary(rows))


if __name__ == "__main__":
    main()

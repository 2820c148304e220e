"""Processor seconds of whole commands, from the first import to the last file, beside an older version of regpipe.

    OMP_NUM_THREADS=1 python tests/benchmarks/start.py [--before CHECKOUT] [--only pair large] [-o TABLE.md]

Each command is a process of its own; the versions take turns, and the least of ``--repeats`` counts. What both
versions write is compared, byte by byte; of manifests, which hold times, the hashes of files. Images are made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from regpipe.io import itk_bridge

REGPIPE = "from regpipe.cli.main import main; main()"
OWN = Path(__file__).parents[2]
PAIRS = 20  # of the folder, beside the first
LARGE = (256, 256, 160)


def image(path: Path, shape: Sequence[int], seed: int, spacing: float = 1.0) -> Path:
    """Smooth noise within an ellipsoid; those of seeds 2 k and 2 k + 1 are one, moved."""
    rng = np.random.default_rng(seed // 2)
    coarse = rng.random([max(4, n // 8) for n in shape])
    grid = np.indices(shape, np.float32)
    if seed % 2:
        bend = rng.standard_normal([len(shape), *[3] * len(shape)])
        grid = grid + np.stack([1.5 * ndimage.zoom(b, np.array(shape) / 3, order=1) for b in bend])
    scale = [(m - 1) / (n - 1) for m, n in zip(coarse.shape, shape, strict=True)]
    at = np.stack([g * s for g, s in zip(grid, scale, strict=True)])
    inside = sum(((g - n / 2) / (0.42 * n)) ** 2 for g, n in zip(grid, shape, strict=True)) < 1
    values = (1000 * inside * (0.2 + ndimage.map_coordinates(coarse, at, order=1, mode="nearest"))).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([*[spacing] * len(shape), *[1.0] * (4 - len(shape))])), path)
    return path


def label(path: Path, of: str) -> str:
    """Three structures of an image, by its grey values."""
    known = nib.Nifti1Image.from_filename(of)
    found = np.digitize(np.asanyarray(known.dataobj), [300, 600, 800]).astype(np.uint8)
    nib.save(nib.Nifti1Image(found, known.affine), path)
    return str(path)


def transform(path: Path) -> Path:
    """A composite as a registered case has it, for an image of ``LARGE``: a field of 2 mm and an affine."""
    place = np.diag([2.0, 2, 2, 1])
    field = ndimage.zoom(np.random.default_rng(5).standard_normal((3, 8, 8, 5)), (1, 16, 16, 16), order=1)
    affine = np.eye(4)
    affine[:3, 3] = 3, -2, 1
    path.write_bytes(itk_bridge.composite_h5(itk_bridge.field_part(4 * field, place), itk_bridge.affine_part(affine)))
    return path


def commands(data: Path) -> dict[str, list[str]]:
    """Name -> words after ``regpipe``; OUT stands for the folder of the results."""
    small = [str(image(data / f"{i}.nii.gz", (64, 64), i)) for i in range(2)]
    labels = [
        word
        for i, side in enumerate(("fixed", "moving"))
        for word in (f"--{side}-label", label(data / f"l{i}.nii.gz", small[i]))
    ]
    medium = [str(image(data / f"m{i}.nii.gz", (96, 128, 60), i, 1.5)) for i in range(2)]
    large = str(image(data / "large.nii.gz", LARGE, 0))
    for i in range(2 * PAIRS + 2):
        side = ("fixed", "moving")[i % 2]
        image(data / "many" / f"{side}_images" / f"{i // 2:03d}.nii.gz", (64, 64), i)
        if i < 2:
            image(data / "one" / f"{side}_images" / "000.nii.gz", (64, 64), i)
    chain, folder = str(transform(data / "chain.h5")), ["--affine", "none", "-o", "OUT"]
    return {
        "help": ["--help"],
        "pair": ["register", *small, "-o", "OUT"],
        "labels": ["register", *small, *labels, "-o", "OUT"],
        "zero": ["register", *small, "--bundle", "none", "-o", "OUT"],
        "one": ["register", str(data / "one"), *folder],
        "many": ["register", str(data / "many"), *folder],
        "jobs": ["register", str(data / "many"), *folder, "--jobs", "2"],
        "large": ["apply", chain, large, "--reference", large, "-o", "OUT"],
        "compose": ["compose", chain, chain, "-o", "OUT/chain.h5"],
        "jacobian": ["jacobian", chain, "--reference", medium[0], "-o", "OUT/jacobian.nii.gz"],
        "medium": ["register", *medium, "-o", "OUT"],
    }


def cost(command: Sequence[str], checkout: Path) -> tuple[float, float]:
    """Processor seconds, and seconds by the clock, of a process and those that it starts."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    told = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", *command], env=told, cwd=checkout, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, time.monotonic() - begun


def digests(folder: Path) -> dict[str, str]:
    """What a command wrote: of each file a hash."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            data = json.dumps(json.loads(data)["files"]).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def sampling_alone(data: Path) -> float:
    """Processor seconds of SimpleITK's Resample of the large image through the same transform."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    moving, chain = sitk.ReadImage(str(data / "large.nii.gz")), sitk.ReadTransform(str(data / "chain.h5"))
    begun = time.process_time()
    sitk.Resample(moving, moving, chain, sitk.sitkLinear)
    return time.process_time() - begun


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--before", type=Path, help="a checkout of an older version")
    options.add_argument("--only", nargs="*", help="names of commands")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    versions = {"before": given.before, "now": OWN} if given.before else {"now": OWN}
    with tempfile.TemporaryDirectory() as aside:
        table = measured(Path(aside), versions, given.only, given.repeats)
    print(table)
    if given.out:
        given.out.write_text(table + "\n")


def measured(data: Path, versions: dict[str, Path], only: Sequence[str] | None, repeats: int) -> str:
    """The table of all commands, in Markdown."""
    lines = [f"| | {' | '.join(f'{name}, processor s | s' for name in versions)} | files |"]
    lines.append("|---" * (2 + 2 * len(versions)) + "|")
    known = {"torch": ["import torch"], **{name: [REGPIPE, *words] for name, words in commands(data).items()}}
    for name, command in known.items():
        if only and name not in only:
            continue
        best = {version: (float("inf"), float("inf")) for version in versions}
        wrote: dict[str, dict[str, str]] = {}
        for turn in range(repeats):
            for version, checkout in versions.items():
                if name == "jobs" and version == "before":
                    continue
                out = data / f"{name}_{version}_{turn}"
                words = [word.replace("OUT", str(out)) if word.startswith("OUT") else word for word in command]
                best[version] = min(best[version], cost(words, checkout))
                wrote[version] = digests(out)
        same = "the same" if len({json.dumps(found) for found in wrote.values()}) == 1 else "differ"
        files = f"{len(wrote['now'])}, {same}" if wrote["now"] else ""
        cells = " | ".join(f"{cpu:.2f} | {clock:.1f}" if cpu < float("inf") else " | " for cpu, clock in best.values())
        lines.append(f"| {name} | {cells} | {files} |")
    if not only or "large" in only:
        lines.append(f"\nSimpleITK's resampling of the large image alone: {sampling_alone(data):.2f} processor s.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

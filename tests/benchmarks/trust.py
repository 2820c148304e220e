"""How often regpipe warns of planted failures, and how often of good pairs: false alarms and misses.

    python tests/benchmarks/trust.py -o OUT [--data DIR] [--pairs 20] [--slices 10] [--seconds 280]

Held-out pairs of ``hippocampus_mr`` through a bundle that is trained for ``--seconds`` on the others, and pairs of
``brain_mr_2d`` from zero; each as it is, and with its moving image exchanged for one that should not be trusted:

    flipped      mirrored left to right, the header as before
    organ        another organ of that size and spacing: a crop of a head, or of a lung CT
    inverted     dark for bright
    ultrasound   a crop of an ultrasound image
    half         a half of it, along one axis after the other

``OUT/cases.csv`` has a line per case, ``OUT/table.md`` the rates. One thread; images are made in ``OUT`` and are as
restricted as those in ``--data``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from regpipe import list_pairs
from regpipe.bundle.run import register_with_bundle
from regpipe.bundle.write import write_bundle
from regpipe.data.pairs import Case
from regpipe.inference.from_zero import register_from_zero
from regpipe.io.images import Image, read_image
from regpipe.io.labels import read_label
from regpipe.utils.errors import one_line_errors
from regpipe.utils.files import replace_file

HERE = Path(__file__).parent
DATA = Path(os.environ.get("REGPIPE_DATA", HERE.parents[2] / "shared" / "data"))
CONFIGS = HERE.parents[1] / "configs"
Plant = Callable[[Image, int], Image]


def crops(files: Sequence[Path], seed: int) -> Plant:
    """Gives an image of the given one's size and spacing out of one of the files, from its inner part."""

    def crop(image: Image, case: int) -> Image:
        other = read_image(files[case % len(files)])
        array, spacing = other.array, other.spacing
        if array.ndim > image.array.ndim:  # a slice across the longest axis, through the middle
            axis = int(np.argmax(array.shape))
            array, spacing = array.take(array.shape[axis] // 2, axis), np.delete(spacing, axis)
        wanted = np.array(image.array.shape) * image.spacing
        scale = max(1.0, float((wanted / (np.array(array.shape) * spacing)).max()))  # a small one is made larger
        room = np.array(array.shape) - wanted / (scale * spacing)
        low = np.random.default_rng([seed, case]).uniform(0.3, 0.7, len(room)) * room
        step = image.spacing / (scale * spacing)
        found = ndimage.affine_transform(array, step, low, output_shape=image.array.shape, order=1, mode="nearest")
        return Image(found, image.affine)

    return crop


def left_right(image: Image) -> int:
    """The array axis that runs along the patient's left and right; of a slice its first."""
    return int(np.argmax(np.abs(image.affine[0, :-1])))


def flipped(image: Image, _: int) -> Image:
    return Image(np.ascontiguousarray(np.flip(image.array, left_right(image))), image.affine)


def inverted(image: Image, _: int) -> Image:
    return Image(image.array.max() - image.array, image.affine)


def half(image: Image, case: int) -> Image:
    axis = case % image.array.ndim
    return Image(image.array.take(range(image.array.shape[axis] // 2), axis), image.affine)


def save(path: Path, image: Image) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4)
    dim = image.array.ndim
    affine[np.ix_([*range(dim), 3], [*range(dim), 3])] = image.affine
    nib.save(nib.Nifti1Image(image.array, affine), path)
    return str(path)


def planted(cases: Sequence[Case], plants: Mapping[str, Plant | None], folder: Path) -> Iterator[tuple[str, Path]]:
    """Each plant with a datalist of its pairs; labels where they go along with the image."""
    for name, plant in plants.items():
        entries = []
        for i, case in enumerate(cases):
            entry = {key: case[key] for key in ("case", "fixed_image", "moving_image", "fixed_label", "moving_label")}
            if plant is not None:
                at = folder / name / f"{i}.nii.gz"
                entry["moving_image"] = save(at, plant(read_image(case["moving_image"]), i))
                if plant in (flipped, half):
                    carried = plant(read_label(case["moving_label"])[0], i)
                    entry["moving_label"] = save(folder / f"{name}_labels" / at.name, carried)
                elif plant is not inverted:
                    del entry["moving_label"]
            entries.append(entry)
        listed = folder / f"{name}.json"
        replace_file(listed, json.dumps({"test": entries}).encode())
        yield name, listed


def disjoint(cases: Sequence[Case], count: int) -> list[Case]:
    """Pairs in which no image comes twice."""
    seen: set[str] = set()
    found: list[Case] = []
    for case in cases:
        files = {case["fixed_image"], case["moving_image"]}
        if not files & seen and len(found) < count:
            found.append(case)
            seen |= files
    return found


def train(bundle: Path, data: Path, seconds: float) -> None:
    from monai.bundle import run

    if (bundle / "models" / "manifest.json").is_file():
        return
    write_bundle("alexnet", bundle)
    configs = [str(bundle / "configs" / "train.yaml"), str(CONFIGS / "hippocampus_mr.yaml")]
    told: dict[str, Any] = {"budget_seconds": seconds, "max_epochs": 1000, "pairs_per_epoch": 40, "val_interval": 1}
    run("training", config_file=configs, bundle_root=str(bundle), dataset_dir=str(data), **told)


def rows(name: str, plant: str, out: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(out.glob("*/metrics.json")):
        row = json.loads(file.read_text())
        kinds = sorted({line.partition(":")[0] for line in row["warnings"]})
        dice = row.get("dice")
        yield {"set": name, "plant": plant, "case": row["case"], "dice": dice, "kinds": " ".join(kinds).lower()}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Per set and plant: how many cases have a warning, of which kinds, and their Dice."""
    lines = [
        "| set | moving image | cases | warned | Dice | kinds of warnings, in cases |",
        "|---|---|---|---|---|---|",
    ]
    for name, plant in dict.fromkeys((row["set"], row["plant"]) for row in found):
        own = [row for row in found if (row["set"], row["plant"]) == (name, plant)]
        kinds = [kind for row in own for kind in row["kinds"].split()]
        counts = ", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds), key=kinds.count, reverse=True))
        dices = [row["dice"] for row in own if row["dice"] is not None]
        dice = f"{np.mean(dices):.2f}" if dices else ""
        warned = sum(bool(row["kinds"]) for row in own)
        lines.append(f"| {name} | {plant} | {len(own)} | {warned} | {dice} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for bundle, images and results")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets")
    parser.add_argument("--pairs", type=int, default=20, help="of hippocampus_mr")
    parser.add_argument("--slices", type=int, default=10, help="pairs of brain_mr_2d")
    parser.add_argument("--seconds", type=float, default=280, help="of training")
    given = parser.parse_args()
    one_line_errors()
    out, data = given.out.absolute(), given.data.absolute()
    organs = [data / "lung_ct" / "baseline.nii.gz", *sorted((data / "brain_mr_3d" / "images").iterdir())[:1]]
    liver = sorted((data / "ultrasound_2d" / "liver").rglob("*.png"))
    common: dict[str, Plant | None] = {"as it is": None, "flipped": flipped, "inverted": inverted, "half": half}
    small: dict[str, Plant | None] = {
        **common,
        "organ": crops(organs, 1),
        "ultrasound": crops([data / "ultrasound_3d" / "brain_case3.nii.gz"], 2),
    }
    flat: dict[str, Plant | None] = {
        **common,
        "organ": crops([data / "lung_ct" / "baseline.nii.gz"], 3),
        "ultrasound": crops(liver, 4),
    }
    train(out / "bundle", data / "hippocampus_mr", given.seconds)
    found: list[dict[str, Any]] = []
    others = list_pairs(data / "hippocampus_mr", split="validation", holdout=40, max_pairs=1000, seed=0)
    held = disjoint(others, given.pairs)
    for plant, listed in planted(held, small, out / "hippocampus"):
        target = out / "registered" / "hippocampus" / plant
        register_with_bundle(out / "bundle", listed, target, {"formats": ["itk"]})
        found += rows("hippocampus, bundle", plant, target)
    pairs = list_pairs(data / "brain_mr_2d", split="all")
    slices = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[: given.slices]]
    for plant, listed in planted(slices, flat, out / "brain"):
        target = out / "registered" / "brain" / plant
        register_from_zero(str(listed), str(target), formats=["itk"])
        found += rows("brain slices, from zero", plant, target)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, found[0].keys())
    writer.writeheader()
    writer.writerows(found)
    replace_file(out / "cases.csv", text.getvalue().encode())
    replace_file(out / "table.md", f"{table(found)}\n".encode())
    print(table(found))


if __name__ == "__main__":
    main()

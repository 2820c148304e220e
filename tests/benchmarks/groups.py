"""Labels carried from subject to subject through a template, beside pairs that were registered: Dice.

    python tests/benchmarks/groups.py DATA TEMPLATE OUT --pairs 40

DATA is the folder of subjects with labels, TEMPLATE what ``regpipe template DATA -o TEMPLATE`` wrote. Through the
template every ordered pair is judged; of them ``--pairs``, drawn by a seed, are registered too, as by ``regpipe
register`` into OUT, and both are compared on these. Labels are carried by nearest neighbour, once, to the grid of the
fixed image.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regpipe.group.subjects import Subject, list_subjects
from regpipe.inference.register import register_files
from regpipe.io.labels import read_label
from regpipe.metrics.cases import read_rows
from regpipe.metrics.measures import dice, mean_of, shared_labels
from regpipe.transforms import initial
from regpipe.transforms.read import Space
from regpipe.transforms.resample import resample

Pair = tuple[Subject, Subject]  # fixed, moving


def through(template: Path, pair: Pair) -> float:
    """Mean Dice of the moving subject's labels on the fixed one, by way of the template."""
    (fixed, _), (moving, _) = (read_label(str(one.label)) for one in pair)
    there, back = (str(template / "subjects" / one.name / "transform.json") for one in (pair[1], pair[0]))
    chain = initial.read({"initial_1": there, "initial_2_inverse": back}, fixed.array.ndim)
    assert chain is not None
    carried = resample(moving, chain.transform, Space(fixed.array.shape, fixed.affine), "nearest")
    return mean_of(dice(fixed.array, carried, shared_labels(fixed.array, moving.array)).values())


def registered(pairs: Sequence[Pair], out: Path, finest: int | None, bundle: str | None) -> list[float]:
    """The same of pairs registered by themselves."""
    keys = ("image", "label")
    entries = [
        {f"{side}_{key}": one.files()[key] for side, one in zip(("fixed", "moving"), pair, strict=True) for key in keys}
        for pair in pairs
    ]
    out.mkdir(parents=True, exist_ok=True)
    listed = out / "pairs.json"
    listed.write_text(json.dumps({"test": entries}))
    register_files(listed, out / "cases", bundle=bundle, finest=finest)
    found = {row["case"]: float(row["dice_native"]) for row in read_rows(out / "cases" / "metrics.csv")}
    return [found[f"{moving.name}_to_{fixed.name}"] for fixed, moving in pairs]


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % bootstrap interval over pairs."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return f"{np.mean(values):.3f} [{np.percentile(drawn, 2.5):.3f}, {np.percentile(drawn, 97.5):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "template", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--finest", type=int)
    parser.add_argument("--bundle", help="of the pairs; none: from zero; default: that of regpipe register")
    chosen = parser.parse_args()
    pairs = list(itertools.permutations(list_subjects(chosen.data), 2))
    by_template = [through(chosen.template, pair) for pair in pairs]
    some = sorted(np.random.default_rng(0).permutation(len(pairs))[: chosen.pairs].tolist())
    print(f"all {len(pairs)} pairs through the template: {interval(by_template)}")
    print(f"{len(some)} of them through the template: {interval([by_template[i] for i in some])}", flush=True)
    alone = registered([pairs[i] for i in some], chosen.out, chosen.finest, chosen.bundle)
    print(f"the same {len(some)} registered by themselves: {interval(alone)}")
    print(f"difference: {interval([by_template[i] - one for i, one in zip(some, alone, strict=True)])}")


if __name__ == "__main__":
    main()

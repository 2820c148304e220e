"""Time and peak memory over the size of a volume, over the pairs of a folder, over the subjects trained on.

    python tests/benchmarks/cost_curves.py [volume pairs subjects kept kept_on_disk] [-o docs/results]

Each point is a command of its own, started and measured from outside: whole processes, imports included (some 5 s).
This program imports nothing large, because a process's peak counts that of the one which started it.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = ("curve", "size", "seconds", "cpu_seconds", "peak_gib")
REGPIPE = str(Path(sys.executable).with_name("regpipe"))


def measured(command: Sequence[str], where: Path) -> dict[str, float]:
    """Run it; seconds, processor seconds and the peak of its resident memory.

    Raises:
        SystemExit: it failed; what it said last.
    """
    start, said = time.perf_counter(), where / "said.txt"
    with said.open("w") as stream:
        child = subprocess.Popen(command, cwd=where, stdout=stream, stderr=stream)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.read_text()[-500:]}")
    peak = used.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(peak, 3),
    }


def volume(side: int, aside: Path) -> dict[str, float]:
    """A pair of side^3, from arrays, registered both ways by resnet18."""
    shape = ",".join([str(side)] * 3)
    return measured(
        [sys.executable, str(HERE / "speed.py"), "--once", "inference", "resnet18", "--shape", shape], aside
    )


def pairs(count: int, aside: Path) -> dict[str, float]:
    """A folder of 2D phantoms registered from zero, five steps each, all files written."""
    measured([REGPIPE, "phantom", "in", "--pairs", str(count), "--shape", "48,48"], aside)
    return measured([REGPIPE, "register", "in", "-o", "out", "--refine", "5", "--affine", "none"], aside)


def subjects(count: int, aside: Path) -> dict[str, float]:
    """Alexnet: two epochs of up to 50 steps on so many 2D phantoms, kept in memory, and the validation of 20 pairs."""
    measured([REGPIPE, "phantom", "in", "--pairs", str(count), "--shape", "96,96"], aside)
    bundle = shutil.copytree(HERE.parents[1] / "bundles" / "symreg_alexnet", aside / "bundle")
    settings = ["--dataset_dir", "../in", "--max_epochs", "2", "--pairs_per_epoch", "50", "--val_interval", "2"]
    command = ["-m", "monai.bundle", "run", "training", "--config_file", "configs/train.yaml", *settings]
    return measured([sys.executable, *command], bundle)


LOADED_TWICE = """
import sys
from regpipe import LoadPair, list_pairs
from regpipe.io.images import Grid
cases, load = list_pairs("in"), LoadPair(Grid((128, 128), (1.0, 1.0)), **eval(sys.argv[1]))
for case in 2 * cases:
    load(case)
"""


def kept(count: int, aside: Path, how: str = "dict(cache=True)") -> dict[str, float]:
    """So many pairs of 2D phantoms loaded twice, without any training, and kept in memory."""
    measured([REGPIPE, "phantom", "in", "--pairs", str(count), "--shape", "128,128"], aside)
    return measured([sys.executable, "-c", LOADED_TWICE, how], aside)


def kept_on_disk(count: int, aside: Path) -> dict[str, float]:
    """The same, kept on disk only."""
    return kept(count, aside, "dict(cache=False, cache_dir='kept')")


CURVES: dict[str, tuple[Callable[[int, Path], dict[str, float]], tuple[int, ...]]] = {
    "volume": (volume, (48, 64, 96, 128, 160, 192, 256)),
    "pairs": (pairs, (10, 100, 1000)),
    "subjects": (subjects, (25, 100, 400)),
    "kept": (kept, (25, 100, 400)),
    "kept_on_disk": (kept_on_disk, (25, 100, 400)),
}


UNITS = {"volume": "voxels", "pairs": "pairs of a folder"}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Processor seconds and peak memory over the size, a column for each unit."""
    import matplotlib  # here: see the module's docstring

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["voxels", "pairs of a folder", "training pairs"]
    figure, axes = plt.subplots(2, len(names), figsize=(9, 5), sharex="col")
    for name in dict.fromkeys(row["curve"] for row in rows):
        points = [row for row in rows if row["curve"] == name]
        sizes = [int(row["size"]) ** (3 if name == "volume" else 1) for row in points]
        column = axes[:, names.index(UNITS.get(name, names[-1]))]
        for place, key in zip(column, ("cpu_seconds", "peak_gib"), strict=True):
            place.plot(sizes, [float(row[key]) for row in points], "o-", label=name.replace("_", " "))
    for place, name in zip(axes[1], names, strict=True):
        place.set_xlabel(name)
    axes[0, 0].set_ylabel("processor seconds")
    axes[1, 0].set_ylabel("peak, GiB")
    for place in axes.flat:
        place.set_ylim(0, 1.15 * place.dataLim.y1)
    for place in axes[:, -1]:
        place.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", default=list(CURVES), help=", ".join(CURVES))
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    file = options.out / "cost_curves.csv"
    kept = []
    if file.is_file():
        kept = [row for row in csv.DictReader(file.open()) if row["curve"] not in options.curves]
    for name in options.curves:
        point, sizes = CURVES[name]
        for size in sizes:
            with tempfile.TemporaryDirectory() as aside:
                row = {"curve": name, "size": size, **point(size, Path(aside))}
            print(row, flush=True)
            kept.append(row)
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)
    plot(kept, options.out / "cost_curves.svg")


if __name__ == "__main__":
    main()

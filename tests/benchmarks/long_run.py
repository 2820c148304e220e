"""Memory, open files and threads of a long training, which must stay what they are: configs/quick.yaml for 200 epochs.

    OMP_NUM_THREADS=1 python tests/benchmarks/long_run.py [--epochs 200] [--backbone alexnet] [-o FILE]

After a fifth of the epochs, by when everything was done once, memory may grow by 32 MiB to the end, open files and
threads by none. Linux.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from regpipe.bundle.write import write_bundle

MOST_MIB = 32.0
COLUMNS = ("epoch", "rss_mib", "open_files", "threads", "seconds")
QUICK = Path(__file__).parents[2] / "configs" / "quick.yaml"


def standing() -> tuple[float, int, int]:
    """Resident MiB, open files and threads of this process, as the system counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
    return (pages * os.sysconf("SC_PAGE_SIZE") / 2**20, *counts)  # type: ignore[return-value]


def train(backbone: str, epochs: int, root: Path) -> list[dict[str, float]]:
    """A row of ``COLUMNS`` per epoch."""
    bundle = write_bundle(backbone, root / "bundle")
    configs = [str(bundle / "configs" / "train.yaml"), str(QUICK)]
    flow = ConfigWorkflow(
        configs,
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=str(bundle / "configs" / "logging.conf"),
        run_id="training",
        bundle_root=str(bundle),
        max_epochs=epochs,
        patience=epochs,
    )
    flow.initialize()
    rows: list[dict[str, float]] = []
    begun = time.monotonic()

    def note() -> None:
        rows.append(dict(zip(COLUMNS, (len(rows) + 1, *standing(), time.monotonic() - begun), strict=True)))

    flow.parser.get_parsed_content("train#trainer").add_event_handler(Events.EPOCH_COMPLETED, note)
    flow.run()
    return rows


def growth(rows: list[dict[str, float]]) -> dict[str, float]:
    """By how much each grows from the second fifth of the epochs to the last, medians of them."""
    part = len(rows) // 5
    early, late = rows[part : 2 * part], rows[-part:]
    return {
        name: float(np.median([row[name] for row in late]) - np.median([row[name] for row in early]))
        for name in COLUMNS[1:4]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--backbone", default="alexnet")
    parser.add_argument("-o", "--out", type=Path, help="a line per epoch, as CSV")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        rows = train(given.backbone, given.epochs, Path(root))
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    found = growth(rows)
    for row in rows[:: max(given.epochs // 8, 1)] + rows[-1:]:
        print(", ".join(f"{name} {value:.0f}" for name, value in row.items()))
    print("growth: " + ", ".join(f"{name} {value:+.1f}" for name, value in found.items()))
    if found["rss_mib"] > MOST_MIB or found["open_files"] > 0 or found["threads"] > 0:
        raise SystemExit("something grows")


if __name__ == "__main__":
    main()

"""Put a trained model into a bundle of the repository, and what was measured of it beside it.

    python tests/benchmarks/ship.py bundles/symreg_resnet18 2 --trained TRAINED [--cascades 2]
    python tests/benchmarks/shipped.py bundles/symreg_resnet18/models/2d/model.pt resnet18 --dims 2 --out OUT
    python tests/benchmarks/ship.py bundles/symreg_resnet18 2 --cases OUT/cases_2d.csv

``TRAINED`` is a bundle's folder after ``configs/synthetic.yaml``. What inference reads goes to ``models/2d`` or ``3d``,
the weights in half precision; the training's manifest, where it has ended, with the hashes of what is shipped. The
cases give the metadata's ``eval_metrics`` and ``models/2d/README.md``: lines of these weights alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from realpairs import SETS
from shipped import COLUMNS, TEXT, load_network, table
from tables import Row, read_cases

from regpipe.bundle.write import METADATA, measured, rendered, with_measured
from regpipe.data import manifest
from regpipe.engines import record
from regpipe.metrics.measures import known
from regpipe.networks.weights import read_state_dict
from regpipe.utils.files import replace_file, sha256

LARGEST = 25_000_000  # bytes of a file: what a code host takes without large-file storage, with room
SCORES = ("dice", "tre", "sdlogj")  # of the metadata


def ship(trained: Path, bundle: Path, dim: int, *, cascades: int | None = None) -> Path:
    """Write the model's folder; returns it. ``cascades``: how often inference applies it, where not as in training."""
    source, target = trained / "models", bundle / "models" / f"{dim}d"
    target.mkdir(parents=True, exist_ok=True)
    load_network(source / "model.pt", backbone_of(bundle), dim)
    state = read_state_dict(source / "model.pt")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    broken = [name for name, tensor in half.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise SystemExit(f"{broken[0]}: out of half precision's range")
    for old in target.iterdir():  # a manifest or a table of the model before
        old.unlink()
    torch.save(half, target / "model.pt")
    if (target / "model.pt").stat().st_size > LARGEST:
        raise SystemExit(f"{target / 'model.pt'}: more than {LARGEST / 1e6:.0f} MB")
    replace_file(target / "working_grid.json", (source / "working_grid.json").read_bytes())
    about = json.loads((source / record.NAME).read_text()) | {"dataset_dir": None, "training_images": []}
    about |= {"cascades": cascades} if cascades else {}
    write_json(target / record.NAME, about)
    if (source / manifest.NAME).is_file():
        content = json.loads((source / manifest.NAME).read_text())
        content["files"] = manifest.hashes(target, manifest.BESIDE)
        write_json(target / manifest.NAME, content)
    return target


def tell(cases: Path, bundle: Path, dim: int) -> None:
    """Write ``README.md`` beside the weights, and the bundle's ``eval_metrics``.

    Raises:
        SystemExit: no line is of these weights.
    """
    folder, backbone = bundle / "models" / f"{dim}d", backbone_of(bundle)
    made = f"{backbone} {sha256([folder / 'model.pt'])[:12]}"
    rows = [row for row in read_cases(cases, COLUMNS, TEXT) if row["made_from"] == made]
    if not rows:
        raise SystemExit(f"{cases}: no line is of {folder / 'model.pt'} ({made}); run shipped.py with it")
    passes = json.loads((folder / record.NAME).read_text())["cascades"]
    kept = {name: value for name, value in measured(bundle).items() if not name.startswith(f"{dim}d_")}
    values = dict(sorted((kept | scores(rows, dim, f"network x {passes}")).items()))
    replace_file(bundle / METADATA, with_measured(rendered(METADATA, backbone), values).encode())
    replace_file(folder / "README.md", page(rows, folder, dim).encode())


def scores(rows: Sequence[Row], dim: int, answer: str) -> dict[str, float]:
    found = {}
    for name in SETS[dim]:
        own = [row for row in rows if (row["set"], row["answer"], row["moving"]) == (name, answer, "as it is")]
        for score in SCORES:
            values = known(row[score] for row in own)
            if len(values):
                found[f"{dim}d_{name}_{score}"] = round(float(values.mean()), 4)
    return found


def page(rows: Sequence[Row], folder: Path, dim: int) -> str:
    head = (
        f"# The {dim}D model in this bundle\n\nTrained on synthetic images alone (`../../docs/data_license.txt`). "
        "On real ones, by `tests/benchmarks/shipped.py` of the repository: mean [95 % bootstrap interval over pairs], "
        "labels by nearest neighbour; 'network x 2' is applied twice, each time to what is left."
    )
    sets = [(name, [row for row in rows if row["set"] == name]) for name in SETS[dim]]
    tables = ["\n".join([f"## {name}", "", *table(own, SETS[dim][name].metrics)]) for name, own in sets if own]
    hashes = "\n".join(f"{item['sha256']}  {item['file']}" for item in manifest.model_files(folder))
    return "\n\n".join([head, *tables, f"## SHA-256\n\n```\n{hashes}\n```\n"])


def backbone_of(bundle: Path) -> str:
    return bundle.resolve().name.removeprefix("symreg_")


def write_json(path: Path, content: object) -> None:
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("dim", type=int, choices=(2, 3))
    parser.add_argument("--trained", type=Path, help="a bundle's folder after its training")
    parser.add_argument("--cascades", type=int, help="how often inference applies the network")
    parser.add_argument("--cases", type=Path, help="what shipped.py measured")
    given = parser.parse_args()
    if given.trained is not None:
        written = ship(given.trained, given.bundle, given.dim, cascades=given.cascades)
        for item in manifest.model_files(written):
            print(item["file"], item["sha256"], (written / item["file"]).stat().st_size)
    if given.cases is not None:
        tell(given.cases, given.bundle, given.dim)

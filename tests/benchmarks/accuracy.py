"""Accuracy of regpipe and of its peers on the same held-out pairs: one table, and paired tests against a reference.

    python tests/benchmarks/accuracy.py SET -o OUT [--methods identity,syn_mi,regpipe_resnet18] [--pairs 20]
    python tests/benchmarks/accuracy.py SET --train --budget 600 --bundle DIR --methods regpipe_resnet18,voxelmorph

SET is a name of ``SETS`` in ``--data`` (default ``$REGPIPE_DATA`` or ``../shared/data``), or a folder. Every method
gets the same arrays, both images on regpipe's working grid, and is judged by ``metrics.measures.measure`` on the
displacement it gives. Each pair is registered in a process of its own, one thread, so that its seconds and its
peak memory are its own. ``OUT/cases.csv`` grows by a line per method and pair: the same command goes on where it
stopped. Peers: ``pip install regpipe[peers]``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peers
from judging import check_convention, judge
from sets import CONFIGS, SETS, Data, as_pair, choices, lung_datalist, open_data
from tables import COSTS, Row, page, read_cases, write_cases

import regpipe
from regpipe import InputError, LoadPair, collate_pairs
from regpipe.bundle.write import write_bundle
from regpipe.engines import record, refine
from regpipe.fields import algebra, folds
from regpipe.io.images import load_grid
from regpipe.losses import regularity, similarity, terms
from regpipe.study.compare import run_bundle
from regpipe.utils.errors import one_line_errors
from regpipe.utils.files import replace_file

HERE = Path(__file__).parent
DATA = Path(os.environ.get("REGPIPE_DATA", HERE.parents[2] / "shared" / "data"))


def register_apart(method: str, pair: peers.Pair, place: peers.Place) -> tuple[peers.Field, dict[str, float]]:
    """Register in a process of its own: (field, {seconds, peak_mib}).

    Raises:
        InputError: the method failed; its last line of stderr says why.
    """
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "pair.npz", Path(folder) / "field.npz"
        peers.save_pair(given, pair)
        command = [sys.executable, str(HERE / "peers.py"), method, str(given), str(made)]
        for name, path in (("--bundles", place.bundles), ("--symnet", place.symnet)):
            command += [name, str(path.absolute())] if path else []
        # elastix leaves files where it is run
        done = subprocess.run(command, cwd=folder, env={**os.environ, **one}, capture_output=True, text=True)
        if done.returncode or not made.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise InputError(f"{method}: {lines[-1]}")
        with np.load(made) as data:
            field = peers.Field(**{name: data[name] for name in peers.Field._fields if name in data.files})
            return field, {name: float(data[name]) for name in COSTS}


REFINING = [  # the code that refinement is
    Path(str(module.__file__)) for module in (refine, terms, similarity, regularity, folds, algebra)
]


def made_from(method: str, place: peers.Place) -> str:
    """What a result depends on beside the pair: a package's version, or a hash of the weights."""
    if method in peers.PACKAGES:
        package = peers.PACKAGES[method]
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"{method}: {package} is not installed; pip install regpipe[peers]") from None
    weights = place.symnet if method == "symnet" else None
    if place.bundles and method not in ("identity", "symnet", "regpipe_zero"):
        weights = model_folder(method, place.bundles) / "model.pt"
    code = REFINING if method.endswith(("_refined", "_zero")) else []
    return " ".join([f"regpipe {regpipe.__version__}", *(_digest(file) for file in (weights, *code) if file)])


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else "none"


def model_folder(method: str, bundles: Path) -> Path:
    """Where the weights of a learned method are: ``regpipe_resnet18_refined`` is the bundle ``resnet18``."""
    return bundles / method.removeprefix("regpipe_").removesuffix("_refined") / "models"


def check_bundles(methods: Sequence[str], place: peers.Place, data: Data) -> None:
    """A trained network is judged on the grid it was trained for, and not on pairs it was trained on.

    Raises:
        InputError: a bundle of another grid, or one that has seen a pair.
    """
    for models in {model_folder(method, place.bundles) for method in methods if place.bundles}:
        if not (models / "model.pt").is_file():
            continue
        grid = load_grid(models / "working_grid.json")
        if grid != data.grid:
            raise InputError(f"{models}: trained on {grid}, the pairs are on {data.grid}; give --spacing or --holdout")
        record.refuse_training_images(data.cases, record.read(str(models)))


def run_methods(methods: Sequence[str], data: Data, place: peers.Place, out: Path, *, masks: bool = False) -> list[Row]:
    """Register each pair by each method that has no line for it yet; returns the lines of these methods and pairs.

    A method that fails on a pair is told of and has no line: the next run tries again.
    """
    same_run(out, data, masks=masks)
    sources = {method: made_from(method, place) for method in methods}
    rows = [
        row for row in read_cases(out / "cases.csv") if sources.get(row["method"], row["made_from"]) == row["made_from"]
    ]
    finished = {(row["method"], row["case"]) for row in rows}
    load, checked = LoadPair(data.grid, landmark_channels=data.landmark_channels), set[str]()
    for i, case in enumerate(data.cases):
        todo = [method for method in methods if (method, case["case"]) not in finished]
        batch = collate_pairs([load(case)]) if todo else {}
        for method in todo:
            try:
                field, costs = register_apart(method, as_pair(batch, data.grid, masks=masks), place)
                if method not in checked:
                    check_convention(method, field, batch)
                    checked.add(method)
                measured = judge(field, batch, data.grid.spacing)
            except InputError as problem:
                print(f"{case['case']}: {problem}", file=sys.stderr, flush=True)
                continue
            rows.append({"method": method, "case": case["case"], "made_from": sources[method], **costs, **measured})
            write_cases(out / "cases.csv", rows)
            print(
                f"{i + 1}/{len(data.cases)} {case['case']} {method}: dice {measured['dice']:.4f} "
                f"tre {measured['tre']:.2f} ncc {measured['ncc']:.3f} folds {measured['folds_percent']:.4f} % "
                f"sdlogj {measured['sdlogj']:.3f} in {costs['seconds']:.2f} s, {costs['peak_mib']:.0f} MiB",
                flush=True,
            )
    names = {case["case"] for case in data.cases}
    return [row for row in rows if row["method"] in methods and row["case"] in names]


def same_run(out: Path, data: Data, *, masks: bool) -> None:
    """Refuse to mix lines of other data, grid or masks in one ``cases.csv``."""
    about = {"grid": [*map(list, data.grid)], "masks": masks, **data.settings}
    path, text = out / "settings.json", json.dumps(about, indent=1)
    if path.is_file() and path.read_text() != text:
        raise InputError(f"{path}: this folder's lines were made with other settings; give another -o")
    replace_file(path, text.encode())


def train(methods: Sequence[str], name: str, data: Data, bundles: Path, *, budget: float | None) -> None:
    """Train the networks among the methods on the set's training pairs, each for the same seconds, by one bundle.

    Skipped where the same has been trained already.
    """
    settings = data.settings | ({"budget_seconds": budget, "max_epochs": 100_000} if budget else {})
    overlays = [str(path) for path in (CONFIGS / f"{name}.yaml",) if path.is_file()]
    for method in methods:
        backbone = method.removeprefix("regpipe_")
        if backbone not in (*peers.BACKBONES, *peers.TRAINED):
            continue
        own = [] if backbone in peers.BACKBONES else [str(CONFIGS / f"{backbone.removesuffix('_trained')}.yaml")]
        folder = bundles.absolute() / backbone
        if not (folder / "configs").is_dir():
            write_bundle(backbone if backbone in peers.BACKBONES else peers.BACKBONES[0], folder)
        run_bundle(folder, overlays=[*overlays, *own], settings={k: v for k, v in settings.items() if v is not None})


def main(argv: Sequence[str] | None = None) -> None:
    one_line_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help=f"{', '.join(SETS)}, or a folder or datalist")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", default="identity,ants_affine,syn_mi", help=", ".join(peers.METHODS))
    parser.add_argument("--reference", help="of the paired tests; default: the last method that has a result")
    parser.add_argument("--pairs", type=int, default=100, help="at most so many, drawn at random")
    parser.add_argument("--bundle", type=Path, help="a folder of trained bundles: a comparison's, or made by --train")
    parser.add_argument("--symnet", type=Path, help="SYMNet's published weights; default: in --data")
    parser.add_argument("--holdout", type=float)
    parser.add_argument("--pairing", choices=("all", "first"))
    parser.add_argument("--landmark-channels", type=int)
    parser.add_argument("--spacing", type=lambda text: [float(mm) for mm in text.split(",")], help="mm, e.g. 2,2,2")
    parser.add_argument("--masks", action="store_true", help="give the masks to the methods that take any")
    parser.add_argument("--train", action="store_true", help="train the networks in --bundle, and do nothing else")
    parser.add_argument("--budget", type=float, help="seconds of training, each")
    parser.add_argument("-o", "--out", type=Path, default=Path("accuracy"))
    options = parser.parse_args(argv)
    methods = options.methods.split(",")
    unknown = [m for m in (*methods, *filter(None, [options.reference])) if m not in peers.METHODS]
    if unknown:
        raise InputError(f"--methods {unknown[0]}: not one of {', '.join(peers.METHODS)}")
    data = _data_of(options)
    if options.train:
        if options.bundle is None:
            raise InputError("--train: needs --bundle DIR, where the networks are to be")
        given = {"grid_spacing": options.spacing} if options.spacing else {}
        data = data._replace(settings=data.settings | given)
        train(methods, options.set, data, options.bundle, budget=options.budget)
        return
    weights = options.symnet or options.data / "symnet" / "symnet_oasis.pth"
    place = peers.Place(options.bundle, weights if weights.is_file() else None)
    check_bundles(methods, place, data)
    rows = run_methods(methods, data, place, options.out, masks=options.masks)
    if rows:
        found = [method for method in methods if any(row["method"] == method for row in rows)]
        text = page(rows, found, options.reference or found[-1])
        replace_file(options.out / "accuracy.md", (text + "\n").encode())
        print(text)


def _data_of(options: argparse.Namespace) -> Data:
    given = {"holdout": options.holdout, "pairing": options.pairing, "grid_spacing": options.spacing}
    given["landmark_channels"] = options.landmark_channels
    chosen = choices(options.set) | {name: value for name, value in given.items() if value is not None}
    where = options.data / options.set if options.set in SETS else Path(options.set)
    if options.set == "lung_ct":
        where = lung_datalist(where.absolute(), options.out)
    return open_data(where.absolute(), chosen, options.pairs)


if __name__ == "__main__":
    main()

"""What a network that was trained on synthetic images alone is worth on real ones, of every set that there is.

    python tests/benchmarks/shipped.py MODEL.pt BACKBONE --dims 3 [--refine 50] [--sets echo restraint] [--out shipped]
    python tests/benchmarks/shipped.py --from-zero --syn --dims 2     # on the same pairs, to compare

MODEL.pt is the state dict of a ``regpipe.SymmetricNet``. The sets are ``realpairs.SETS``, in ``--data`` (default
``$REGPIPE_DATA`` or ``../shared/data``). Each answer is asked for with the moving image as it is and inverted with its
gamma changed; that is all that is changed: stages before the network, and every measure, look at the images as they
are. Seconds are of the processor, for the answer alone (displacements and warped images both ways), no reading.

``OUT/cases_{2,3}d.csv`` grows by a line per answer, ``OUT/table_{2,3}d.md`` is made of all its lines; ``OUT/aligned``
keeps the affine stage's work. The same command goes on where it stopped; what fails is told of, has no line, and stops
nothing else. A line belongs to the weights of its network (``made_from``), not to this package's code: give another
``--out`` where that has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peers
import torch
from accuracy import DATA, REFINING, made_from
from judging import SPLIT_DICE, judge
from peers import Field
from realpairs import SETS, Folders, Loaded, RealPair
from sets import as_pair
from tables import HEADINGS, Row, cells_of, csv_lines, line, mean_cell, read_cases
from torch import Tensor, nn
from ultrasound import tissue

from regpipe import InputError, SymmetricNet
from regpipe.engines.inferers import RegistrationInferer, ZeroInferer, prepare_batch
from regpipe.engines.refine import WINDOW, make_refiner, refinement_loss, zero_refiner
from regpipe.fields.algebra import warp
from regpipe.losses.lncc import lncc
from regpipe.metrics.measures import known
from regpipe.metrics.metric import columns, heading
from regpipe.networks.weights import read_state_dict
from regpipe.utils.errors import one_line_errors
from regpipe.utils.files import replace_file, sha256

CASCADES = (1, 2)
MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda image: image,
    "inverted": lambda image: (1 - image) ** 0.7,
}
ANTS = {"syn": "syn_mi", "syn_cc": "syn_cc_short"}  # option -> one of ``peers.METHODS``
TEXT = ("made_from", "set", "pair", "answer", "moving")
OWN = {  # measures beyond ``metrics.measures.measure``'s: heading, digits
    "lncc_before": ("LNCC before", 3),
    "lncc": ("LNCC", 3),
    "error_before": ("median error before, voxels", 2),
    "error": ("median error, voxels", 2),
    "moved_mean": ("moved, mean voxels", 3),
    "moved_p95": ("moved, p95 voxels", 3),
}
COUNTED = {"ncc_rose": "NCC rose", "lncc_rose": "LNCC rose"}  # 1 or 0
COLUMNS = (*TEXT, "cpu_seconds", *columns(), *SPLIT_DICE, *OWN, *COUNTED)
SHOWN_HERE = {name: (heading(name), metric.digits) for name, metric in columns("table").items()} | HEADINGS | OWN


# ---- who answers


class Answer(NamedTuple):
    """Someone who lays moving onto fixed: ``solve(what is seen) -> (fields, processor seconds)``."""

    name: str
    made_from: str
    solve: Callable[[Loaded], tuple[Field, float]]


def network_answers(path: Path, backbone: str, dims: int, steps: int) -> Iterator[Answer]:
    """The network applied once and twice, and where there are ``steps`` the same refined."""
    network, made = load_network(path, backbone, dims), f"{backbone} {sha256([path])[:12]}"
    weights = refinement_loss("lncc", spatial_dims=dims)
    for refining in dict.fromkeys((0, steps)):
        refiner = make_refiner(refining, weights, window=WINDOW[dims])
        for cascades in CASCADES:
            inferer = RegistrationInferer(cascades=cascades, refiner=refiner)
            name = f"network x {cascades}" + (f", {refining} steps" if refining else "")
            yield Answer(name, made, functools.partial(infer, inferer, network))


def load_network(path: Path, backbone: str, dims: int) -> nn.Module:
    """Raises ``InputError`` where the file is not this network's."""
    network = SymmetricNet(dims, backbone, pretrained=str(path))
    state = {name: x.float() if x.is_floating_point() else x for name, x in read_state_dict(path).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as problem:
        raise InputError(
            f"{path}: not a {dims}D {backbone}'s weights ({str(problem).splitlines()[-1].strip()})"
        ) from None
    return network.eval()


def zero_answer() -> Answer:
    inferer = ZeroInferer(zero_refiner(), repair=True)
    return Answer("from zero", f"regpipe {sha256(REFINING)[:12]}", functools.partial(infer, inferer, nn.Identity()))


@torch.no_grad()
def infer(inferer: Callable[..., Mapping[str, Tensor]], network: nn.Module, seen: Loaded) -> tuple[Field, float]:
    images, _, _, told = prepare_batch(seen.batch)
    began = time.process_time()
    found = inferer(images, network, **told)
    seconds = time.process_time() - began
    return Field(*(found[name][0].numpy() for name in ("displacement", "inverse"))), seconds


def ants_answer(method: str) -> Answer:
    def solve(seen: Loaded) -> tuple[Field, float]:
        field, costs = peers.run(method, as_pair(seen.batch, seen.grid, masks=False), peers.Place())
        return field, costs["cpu_seconds"]

    return Answer(method, made_from(method, peers.Place()), solve)


# ---- what an answer is worth


def measured(field: Field, truly: Loaded) -> Row:
    batch, u = truly.batch, torch.from_numpy(field.displacement)
    row = judge(field, batch, truly.grid.spacing)
    row |= likeness(batch["fixed_image"], batch["moving_image"], u[None])
    row |= {f"{name}_rose": float(row[name] > row[f"{name}_before"]) for name in ("ncc", "lncc")}
    length = u.norm(dim=0).numpy()
    row |= {"moved_mean": float(length.mean()), "moved_p95": float(np.percentile(length, 95))}
    return row | (errors(batch, u[None]) if "displacement" in batch else {})


def likeness(fixed: Tensor, moving: Tensor, u: Tensor) -> Row:
    """Mean squared local correlation, 1 where they are alike everywhere, 0 in flat places."""
    window = WINDOW[fixed.ndim - 2]
    pairs = {"lncc_before": moving, "lncc": warp(moving, u)}
    return {name: 1 - float(lncc(fixed, image, window=window)) for name, image in pairs.items()}


def errors(batch: Mapping[str, Tensor], u: Tensor) -> Row:
    """Median distance in voxels from the true displacement, where the image shows tissue: standing still, and of u."""
    truth, inside = batch["displacement"], tissue(batch["fixed_image"])
    off = {"error_before": truth, "error": u - truth}
    return {name: float(vectors.norm(dim=1)[inside].median()) for name, vectors in off.items()}


# ---- the run


def run_set(name: str, pairs: Sequence[RealPair], answers: Sequence[Answer], path: Path, failed: list[str]) -> None:
    """Each pair by each answer that has no line for it yet."""
    done = {key_of(row) for row in read_cases(path, COLUMNS, TEXT)}
    for i, pair in enumerate(pairs):
        asked = {
            (answer.made_from, name, pair.name, answer.name, moving): answer for answer in answers for moving in MOVING
        }
        todo = {key: answer for key, answer in asked.items() if key not in done}
        if not todo:
            continue
        with going_on(f"{name}, {pair.name}", failed):
            truly = pair.load()
            for key, answer in todo.items():
                with going_on(", ".join(key[1:]), failed):
                    row = dict(zip(TEXT, key, strict=True)) | ask(answer, key[-1], truly)
                    keep(path, row)
                    print(f"{i + 1}/{len(pairs)} {told_of(row)}", flush=True)


def ask(answer: Answer, moving: str, truly: Loaded) -> Row:
    """One answer to one pair, measured; what does not apply is NaN."""
    seen = truly.batch | {"moving_image": MOVING[moving](truly.batch["moving_image"])}
    field, seconds = answer.solve(truly._replace(batch=seen))
    return dict.fromkeys(COLUMNS[len(TEXT) :], math.nan) | {"cpu_seconds": seconds} | measured(field, truly)


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in TEXT)


def keep(path: Path, row: Row) -> None:
    """Add a line; several runs may do so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        head = [] if stream.tell() else [COLUMNS]
        stream.write(csv_lines([*head, cells_of(row, COLUMNS)]))


def told_of(row: Row) -> str:
    numbers = ("dice_before", "dice", "tre", "lncc", "error", "moved_mean", "sdlogj", "cpu_seconds")
    shown = (f"{name} {row[name]:.3f}" for name in numbers if not math.isnan(row[name]))
    return f"{', '.join(key_of(row)[1:])}: {', '.join(shown)}"


@contextlib.contextmanager
def going_on(what: str, failed: list[str]) -> Iterator[None]:
    """Tell of an error, note what failed, and go on."""
    try:
        yield
    except Exception as problem:
        print(f"{what}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        failed.append(what)


def drawn(pairs: Sequence[RealPair], count: int | None) -> Sequence[RealPair]:
    """At most so many, at random, in order."""
    if count is None or count >= len(pairs):
        return pairs
    kept = np.random.default_rng(0).choice(len(pairs), count, replace=False)
    return [pairs[i] for i in sorted(kept)]


# ---- the table


def page(rows: Sequence[Row], dims: int) -> str:
    """A heading and a table for each set that has lines."""
    notes = (
        "Mean [95 % bootstrap interval over pairs]. Pairs share subjects, so intervals are optimistic. Labels warped "
        "by nearest neighbour. Moving image: as the one who answers sees it; all is measured on the images as they are."
    )
    parts = [notes]
    for name, its in SETS[dims].items():
        own = [row for row in rows if row["set"] == name]
        if own:
            parts += [f"## {name}", "\n".join(table(own, its.metrics))]
    return "\n\n".join(parts)


def table(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    names = [*metrics, "cpu_seconds"]
    head = ["answer", "moving image", "pairs", *(COUNTED.get(n) or SHOWN_HERE[n][0] for n in names), "made from"]
    lines = [line(head), "|---" * len(head) + "|"]
    for kind in dict.fromkeys((row["answer"], row["moving"], row["made_from"]) for row in rows):
        own = [row for row in rows if (row["answer"], row["moving"], row["made_from"]) == kind]
        cells = [cell(name, [row[name] for row in own]) for name in names]
        lines.append(line([*kind[:2], str(len(own)), *cells, kind[2]]))
    return lines


def cell(name: str, values: Sequence[float]) -> str:
    if name in COUNTED:
        return f"{sum(known(values)):.0f} of {len(known(values))}"
    return mean_cell(values, SHOWN_HERE[name][1])


def write_page(folder: Path, dims: int) -> None:
    rows = read_cases(folder / f"cases_{dims}d.csv", COLUMNS, TEXT)
    text = page(rows, dims)
    replace_file(folder / f"table_{dims}d.md", f"{text}\n".encode())
    print(text)


# ---- the command line


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a state dict; without one nothing learned is measured")
    parser.add_argument("backbone", nargs="?", help="of the model")
    parser.add_argument("--dims", type=int, choices=SETS, required=True)
    parser.add_argument(
        "--sets", nargs="+", help=f"of 2D: {', '.join(SETS[2])}; of 3D: {', '.join(SETS[3])}; default: all"
    )
    parser.add_argument("--refine", type=int, default=0, help="steps of refining the network's answer, too")
    parser.add_argument("--from-zero", action="store_true", help="optimise each pair without a network")
    parser.add_argument(
        "--syn", "--syn-mi", action="store_true", help="ANTs' SyN: its default metric is mutual information"
    )
    parser.add_argument(
        "--syn-cc", action="store_true", help="SyN by correlation over 9 voxels, its iterations as by default"
    )
    parser.add_argument("--pairs", type=int, help="at most so many of each set, drawn at random")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("shipped"))
    given = parser.parse_args(argv)
    if (given.model is None) != (given.backbone is None):
        parser.error("a model comes with its backbone: MODEL.pt BACKBONE")
    unknown = [name for name in given.sets or () if name not in SETS[given.dims]]
    if unknown:
        parser.error(f"--sets {unknown[0]}: choose among {', '.join(SETS[given.dims])}")
    return given


def answers_of(given: argparse.Namespace) -> list[Answer]:
    answers: list[Answer] = []
    if given.model is not None:
        answers += network_answers(given.model, given.backbone, given.dims, given.refine)
    answers += [zero_answer()] if given.from_zero else []
    return answers + [ants_answer(method) for option, method in ANTS.items() if getattr(given, option)]


def main(argv: Sequence[str] | None = None) -> None:
    one_line_errors()
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")  # read when ITK is imported
    given = options_of(argv)
    answers, failed = answers_of(given), list[str]()
    at = Folders(given.data, given.out / "aligned")
    for name in given.sets or SETS[given.dims]:
        with going_on(name, failed):
            pairs = drawn(SETS[given.dims][name].pairs(at), given.pairs)
            run_set(name, pairs, answers, given.out / f"cases_{given.dims}d.csv", failed)
    write_page(given.out, given.dims)
    if failed:
        raise SystemExit(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

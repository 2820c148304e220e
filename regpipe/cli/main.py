"""The command line. Training and evaluating are the bundles' own commands."""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from regpipe import __version__
from regpipe.cli import apply, bids, completion, group, provenance, register, results
from regpipe.utils import console
from regpipe.utils.errors import InputError, explain
from regpipe.utils.versions import versions

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
COMMANDS: list[Callable[..., None]] = [
    register.register,
    group.template,
    apply.apply,
    apply.compose,
    apply.jacobian,
    bids.bids,
    results.dashboard,
]
COMMANDS += [results.figures, results.report, results.validate, provenance.verify, provenance.rerun]
for command in COMMANDS:
    app.command()(command)

EVERYWHERE = ("--json", "--quiet")  # may stand after the command, too

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made where needed.")]


def _show_versions(asked: bool) -> None:
    if asked:
        found = versions()
        console.tell(**found)
        print("\n".join(f"{name} {number or 'is missing'}" for name, number in found.items()))
        raise typer.Exit


@app.callback()
def _options(
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Versions that matter, and exit.")
    ] = False,
) -> None:
    """Learned diffeomorphic registration of medical images: train with the bundles, register and compare here.

    --json and --quiet may stand anywhere. Exit status: 0 all done, 1 something could not be done, 2 no such command or
    option, 130 stopped.
    """


@app.command()
def compare(
    out: Out,
    data: Annotated[Path | None, typer.Argument(help="Folder or datalist; default: phantoms.")] = None,
    backbones: Annotated[
        str, typer.Option(help="Which, separated by commas.", autocompletion=completion.some_of(completion.BACKBONES))
    ] = "resnet18,vgg16,alexnet",
    overlay: Annotated[list[Path] | None, typer.Option(help="Over train.yaml: a file, or a name of configs/.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="An id of train.yaml: ID=VALUE.")] = None,
    trust: register.Trust = False,
) -> None:
    """Train and evaluate the backbones on equal terms; print one table with intervals.

    Runs that are finished are not run again, broken ones go on. See the curves with: regpipe dashboard OUT
    """
    from regpipe.bundle.write import overlay as named
    from regpipe.study.compare import compare as run

    settings = _assigned(set_, "--set wants ID=VALUE, e.g. --set max_epochs=20")
    if data is not None:
        settings["dataset_dir"] = str(data.absolute())
    overlays = [str(named(path)) for path in overlay or []]
    names = [name.strip() for name in backbones.split(",")]
    print(run(out, backbones=names, overlays=overlays, settings=settings, trust=trust))
    print(f"\ntable: {out / 'comparison.md'}, {out / 'comparison.csv'}; curves: regpipe dashboard {out}")


@app.command()
def study(
    data: Annotated[Path, typer.Argument(help="Folder of subjects with labels.")],
    out: Out,
    overlay: Annotated[list[Path], typer.Option(help="Over train.yaml, with spatial_dims: a file, or study_2d.")],
    pretrain: Annotated[Path | None, typer.Option(help="Of the training on phantoms: configs/pretrain.yaml.")] = None,
    imagenet: Annotated[
        Path | None, typer.Option(help="Folder of torchvision's weight files; default: its cache, or fetched.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A part of the grid: AXIS=VALUE,VALUE.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of one thread.")] = 1,
) -> None:
    """Do transferred weights and depth pay? Backbones x transfer x training subjects x seeds, on equal terms.

    Axes: backbone, transfer, subjects, seed. Finished runs are not run again; Ctrl-C keeps them. See docs/study.md.
    """
    from regpipe.bundle.write import overlay as named
    from regpipe.study.study import study as run

    parts = _assigned(only, "--only wants AXIS=VALUE,VALUE, e.g. --only subjects=5,all")
    chosen = {axis: [value.strip() for value in values.split(",")] for axis, values in parts.items()}
    pretraining = None if pretrain is None else named(pretrain)
    overlays = [named(path) for path in overlay]
    print(run(data, out, overlays=overlays, pretraining=pretraining, imagenet=imagenet, only=chosen, jobs=jobs))
    console.tell(page=out / "study.md", runs=out / "study.csv")
    print(f"page: {out / 'study.md'}, runs: {out / 'study.csv'}")


def _assigned(items: Sequence[str] | None, wanted: str) -> dict[str, str]:
    """``NAME=VALUE`` items as a mapping; raises ``InputError``, which says what is ``wanted``, for any other."""
    pairs = [item.partition("=") for item in items or ()]
    if not all(separator for _, separator, _ in pairs):
        raise InputError(wanted)
    return {name: value for name, _, value in pairs}


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the pairs to.")],
    kind: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(completion.PHANTOMS[:-1])} or {completion.PHANTOMS[-1]}.",
            autocompletion=completion.one_of(completion.PHANTOMS),
        ),
    ] = "ultrasound",
    shape: Annotated[str, typer.Option(help="Voxels per axis, 2 or 3 numbers.")] = "64,64",
    pairs: Annotated[int, typer.Option(help="How many pairs.")] = 40,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    motion: Annotated[
        float | None, typer.Option(help="Largest displacement in voxels, like a breath; default: a small one.")
    ] = None,
) -> None:
    """Write synthetic pairs with labels, landmarks and the true displacement, as a data set folder."""
    from regpipe.phantoms.cohort import write_cohort

    sides = _sides(shape)
    try:
        folder = write_cohort(out, kind=kind, shape=sides, n_pairs=pairs, seed=seed, motion=motion)
    except ValueError as problem:
        raise InputError(str(problem)) from problem
    console.tell(folder=folder, kind=kind, shape=sides, pairs=pairs, seed=seed)
    print(folder)


@app.command()
def doctor(
    shape: Annotated[str | None, typer.Option(help="Working grid, e.g. 160,192,224: only say what it needs.")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --shape: cpu or cuda; default: cuda where there is one.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="With --shape: of the network.", autocompletion=completion.one_of(completion.BACKBONES))
    ] = "resnet18",
    structures: Annotated[int, typer.Option(min=0, help="With --shape: how many it tells apart.")] = 0,
) -> None:
    """Check the installation: versions, devices, backbones, a phantom registered both ways, files that ITK reads.

    Each check says PASS or FAIL and what to do; exit status 1 where one fails. The report names no path, user or
    machine: put it into a bug report.

    With --shape: how much memory each task takes on that grid, and whether it is there.
    """
    from regpipe.cli.doctor import examine, memory_table

    lines = examine() if shape is None else memory_table(_sides(shape), device, backbone, structures)
    for line in lines:
        print(line, flush=True)


def _sides(shape: str) -> list[int]:
    """Voxels per axis."""
    try:
        return [int(side) for side in shape.split(",")]
    except ValueError:
        raise InputError(f"--shape wants 2 or 3 whole numbers, e.g. 64,64; got {shape}") from None


def main() -> None:
    """Entry point. An error that a user can correct ends in one line on stderr and exit status 1."""
    gc.set_threshold(50_000, 20, 100)  # imports make a million objects that stay: looking for others took a tenth
    warnings.filterwarnings("ignore", module="monai")
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # no torch.py of the current folder in a child
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked = [name for name in EVERYWHERE if name in sys.argv[1:end]]
    arguments = [*asked, *(word for i, word in enumerate(sys.argv) if i > 0 and not (i < end and word in EVERYWHERE))]
    with console.session(json="--json" in asked, quiet="--quiet" in asked):
        status, problem = _run(arguments)
    if "--json" in asked and console.first():
        command = next((word for word in arguments if not word.startswith("-")), None)
        about = {"regpipe": __version__, "command": command, "status": status, "error": problem}
        console.print_json({**about, "result": console.told()})
    raise SystemExit(status)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raises ``InputError`` for an empty word, perhaps of a variable that is not set: as a path it would be ``.``."""
    for before, word in zip(["regpipe", *arguments], arguments, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            raise InputError(f"{word or before}: is followed by an empty word; give it a value, or leave it out")


def _run(arguments: Sequence[str]) -> tuple[int, str | None]:
    """Exit status, and a line about what went wrong."""
    try:
        _refuse_empty(arguments)
        app(arguments, prog_name="regpipe")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        usage = getattr(end.__context__, "format_message", None)  # typer has shown it already
        return status, usage() if usage else None
    except Exception as error:  # the end of a command: whatever it is becomes a line
        told = explain(error)
        if told is None:
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}; this should not happen: report it with regpipe --version"
        console.complain("error", told)
        return 1, told
    return 0, None

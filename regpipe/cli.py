"""The command line: register, compare, phantom, doctor. Training and evaluating are the bundles' own commands."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from regpipe import cli_apply, cli_register, cli_report
from regpipe.errors import InputError, explain

app = typer.Typer(
    help="Learned diffeomorphic registration of medical images: train with the bundles, register and compare here.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

cli_register.add(app)
cli_apply.add(app)
cli_report.add(app)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made where needed.")]


@app.command()
def compare(
    out: Out,
    data: Annotated[Path | None, typer.Argument(help="Folder or datalist; default: phantoms.")] = None,
    backbones: Annotated[str, typer.Option(help="Which, separated by commas.")] = "resnet18,vgg16,alexnet",
    overlay: Annotated[list[Path] | None, typer.Option(help="Configuration over train.yaml, see configs/.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="An id of train.yaml: ID=VALUE.")] = None,
) -> None:
    """Train and evaluate the backbones on equal terms; print one table with intervals.

    Runs that are finished are not run again, broken ones go on. See the curves with: tensorboard --logdir OUT
    """
    from regpipe.compare import compare as run

    pairs = [item.partition("=") for item in set_ or []]
    if any(not separator for _, separator, _ in pairs):
        raise InputError("--set wants ID=VALUE, e.g. --set max_epochs=20")
    settings = {name: value for name, _, value in pairs}
    if data is not None:
        settings["dataset_dir"] = str(data.absolute())
    overlays = [str(path.absolute()) for path in overlay or []]
    print(run(out, backbones=[name.strip() for name in backbones.split(",")], overlays=overlays, settings=settings))
    print(f"\ntable: {out / 'comparison.md'}, {out / 'comparison.csv'}; curves: tensorboard --logdir {out}")


@app.command()
def study(
    data: Annotated[Path, typer.Argument(help="Folder of subjects with labels.")],
    out: Out,
    overlay: Annotated[list[Path], typer.Option(help="Over train.yaml, with spatial_dims: configs/study_2d.yaml.")],
    pretrain: Annotated[Path | None, typer.Option(help="Of the training on phantoms: configs/pretrain.yaml.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A part of the grid: AXIS=VALUE,VALUE.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of one thread.")] = 1,
) -> None:
    """Do transferred weights and depth pay? Backbones x transfer x training subjects x seeds, on equal terms.

    Axes: backbone, transfer, subjects, seed. Finished runs are not run again; Ctrl-C keeps them. See docs/study.md.
    """
    from regpipe.study import study as run

    parts = [item.partition("=") for item in only or []]
    if any(not separator for _, separator, _ in parts):
        raise InputError("--only wants AXIS=VALUE,VALUE, e.g. --only subjects=5,all")
    chosen = {axis: [value.strip() for value in values.split(",")] for axis, _, values in parts}
    print(run(data, out, overlays=overlay, pretraining=pretrain, only=chosen, jobs=jobs))
    print(f"page: {out / 'study.md'}, runs: {out / 'study.csv'}")


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the pairs to.")],
    kind: Annotated[str, typer.Option(help="ultrasound, mr or shapes.")] = "ultrasound",
    shape: Annotated[str, typer.Option(help="Voxels per axis, 2 or 3 numbers.")] = "64,64",
    pairs: Annotated[int, typer.Option(help="How many pairs.")] = 40,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    motion: Annotated[
        float | None, typer.Option(help="Largest displacement in voxels, like a breath; default: a small one.")
    ] = None,
) -> None:
    """Write synthetic pairs with labels, landmarks and the true displacement, as a data set folder."""
    from regpipe.cohort import write_cohort

    sides = _sides(shape)
    try:
        print(write_cohort(out, kind=kind, shape=sides, n_pairs=pairs, seed=seed, motion=motion))
    except ValueError as problem:
        raise InputError(str(problem)) from problem


@app.command()
def doctor(
    shape: Annotated[str | None, typer.Option(help="Working grid, e.g. 160,192,224: only say what it needs.")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --shape: cpu or cuda; default: cuda where there is one.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="With --shape: of the network.")] = "resnet18",
    structures: Annotated[int, typer.Option(min=0, help="With --shape: how many it tells apart.")] = 0,
) -> None:
    """Check the installation: versions, device, the three backbones, a phantom registered, a file that ITK reads.

    With --shape: how much memory each task takes on that grid, and whether it is there.
    """
    from regpipe.doctor import examine, memory_table

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
    """Entry point: what a user can mend ends in one line on stderr and exit status 1."""
    warnings.filterwarnings("ignore", module="monai")
    try:
        app()
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(1) from None

"""The command line: register, compare, phantom, doctor. Training and evaluating are the bundles' own commands."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from regpipe.errors import InputError, explain

app = typer.Typer(
    help="Learned diffeomorphic registration of medical images: train with the bundles, register and compare here.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made where needed.")]


@app.command()
def register(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER | FIXED MOVING", help="A folder (or datalist) of pairs, or two image files."),
    ],
    out: Out,
    bundle: Annotated[
        Path | None,
        typer.Option(help="A trained bundle, or a comparison: its best. None: no network, see --refine."),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="Steps of per-pair optimisation after the network's answer (default 0), or from zero."),
    ] = None,
    similarity: Annotated[
        str | None, typer.Option(help="What refinement compares images by: lncc, mind, mi, ncc, mse.")
    ] = None,
    smoothness: Annotated[
        float | None, typer.Option(help="Of refinement; 1: the default, 0.5 follows the images further.")
    ] = None,
    finest: Annotated[
        int | None,
        typer.Option(
            min=1, help="Without a bundle: 1 compares at full resolution, 2 at half, faster; default: by size."
        ),
    ] = None,
    fixed_label: Annotated[Path | None, typer.Option(help="With two files: label map of FIXED.")] = None,
    moving_label: Annotated[Path | None, typer.Option(help="With two files: label map of MOVING.")] = None,
    pairing: Annotated[
        str | None,
        typer.Option(help="Of a folder of subjects: all ordered pairs, or each onto the first; default: as trained."),
    ] = None,
) -> None:
    """Register a folder of pairs, or one pair: with a trained bundle, or without any by optimising each pair.

    Each case gets a folder with the warped image and labels, the displacement both ways (LPS mm, for ITK, ANTs and
    Slicer), the Jacobian, pictures and metrics. Finished cases are skipped; a bad one is reported and the others go on.
    """
    if len(inputs) > 2:
        raise InputError(f"{len(inputs)} inputs: give one folder, or FIXED and MOVING")
    with tempfile.TemporaryDirectory() as aside:
        dataset = inputs[0]
        if len(inputs) == 2:
            labels = {"fixed_label": fixed_label, "moving_label": moving_label}
            dataset = _one_pair(Path(aside) / "pair.json", inputs[0], inputs[1], labels)
        elif fixed_label or moving_label:
            raise InputError("--fixed-label and --moving-label go with two files; a folder holds its own labels")
        if bundle is None:
            _register_from_zero(dataset, out, pairing, refine, _loss(similarity, smoothness), finest)
        else:
            loss = _loss(similarity, smoothness) if (similarity, smoothness) != (None, None) else None
            _run_inference(bundle, dataset, out, pairing, refine, loss)


def _loss(similarity: str | None, smoothness: float | None) -> dict[str, Any]:
    """What ``refinement_loss`` is told, checked."""
    from regpipe.refine import refinement_loss

    chosen: dict[str, Any] = {
        "similarity": similarity or "lncc",
        "smoothness": 1.0 if smoothness is None else smoothness,
    }
    refinement_loss(**chosen)
    return chosen


def _register_from_zero(
    dataset: Path, out: Path, pairing: str | None, steps: int | None, loss: dict[str, Any], finest: int | None
) -> None:
    from regpipe.inference import register_from_zero
    from regpipe.refine import ZERO_STEPS, refinement_loss

    steps = ZERO_STEPS if steps is None else steps
    weights = refinement_loss(**loss)
    register_from_zero(str(dataset), str(out), pairing=pairing or "all", steps=steps, weights=weights, finest=finest)


def _one_pair(path: Path, fixed: Path, moving: Path, labels: dict[str, Path | None]) -> Path:
    files = {"fixed_image": fixed, "moving_image": moving, **labels}
    entry = {key: str(file.absolute()) for key, file in files.items() if file is not None}
    for file in entry.values():
        if not Path(file).is_file():
            raise InputError(f"{file}: no such file")
    path.write_text(json.dumps({"test": [entry]}))
    return path


def _run_inference(
    bundle: Path, dataset: Path, out: Path, pairing: str | None, refine: int | None, loss: dict[str, Any] | None
) -> None:
    from monai.bundle import ConfigWorkflow

    from regpipe.compare import bundle_in

    chosen: dict[str, Any] = {}
    if pairing:
        chosen["pairing"] = pairing
    if refine is not None:
        chosen["refine"] = refine
    if loss is not None:
        if not refine:
            raise InputError("--similarity and --smoothness: with a bundle they go with --refine STEPS, 0 by default")
        told = ", ".join(f"{name}={value!r}" for name, value in loss.items())
        chosen["refine_loss"] = f"$regpipe.refine.refinement_loss(structures=@structures, {told})"

    bundle = bundle_in(bundle)
    config = bundle / "configs" / "inference.yaml"
    if not config.is_file():
        raise InputError(f"{config}: no such file; give a bundle folder, one with configs/ and models/")
    workflow = ConfigWorkflow(
        str(config),
        workflow_type="infer",
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=str(bundle / "configs" / "logging.conf"),
        bundle_root=str(bundle),
        dataset_dir=str(dataset),
        output_dir=str(out),
        **chosen,
    )
    workflow.initialize()
    workflow.run()


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

    try:
        sides = [int(side) for side in shape.split(",")]
    except ValueError:
        raise InputError(f"--shape wants 2 or 3 whole numbers, e.g. 64,64; got {shape}") from None
    try:
        print(write_cohort(out, kind=kind, shape=sides, n_pairs=pairs, seed=seed, motion=motion))
    except ValueError as problem:
        raise InputError(str(problem)) from problem


@app.command()
def doctor() -> None:
    """Check the installation: versions, device, the three backbones, a phantom registered, a file that ITK reads."""
    from regpipe.doctor import examine

    for line in examine():
        print(line, flush=True)


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

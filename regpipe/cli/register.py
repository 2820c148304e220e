"""``regpipe register``: a folder of pairs, or two files, with a bundle or without any."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regpipe.cli import completion
from regpipe.cli.apply import Fill
from regpipe.utils.errors import InputError
from regpipe.utils.settings import AffineOptions, RefinementOptions


def option(kind: type, name: str, complete: Sequence[str] = (), *, several: bool = False, **more: Any) -> Any:
    """typer's option for one of ``utils.settings``, spelt as a bundle and messages spell it, too."""
    about = kind.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    known = complete or about["among"]
    completed = completion.some_of(known) if several else completion.one_of(known)
    spelt = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
    return typer.Option(*spelt, help=about["help"].format(", ".join(known)), autocompletion=completed, **more)


Formats = Annotated[
    str | None,
    typer.Option(
        help=f"Transform files, by commas: {', '.join(completion.FORMATS).replace('ants', 'ants (by default)')}.",
        autocompletion=completion.some_of(completion.FORMATS),
    ),
]
Metric = Annotated[str | None, option(AffineOptions, "affine_metric")]
Similarity = Annotated[str | None, option(RefinementOptions, "similarity", completion.SIMILARITIES)]
Smoothness = Annotated[float | None, option(RefinementOptions, "smoothness")]
Finest = Annotated[int | None, option(RefinementOptions, "finest", min=1)]
Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="FOLDER | FIXED MOVING", help="A folder (or datalist) of pairs, or two image files."),
]

Trust = Annotated[
    bool, typer.Option("--trust", help="Run a bundle whose configuration is not regpipe's own: it can run any code.")
]


def asked(context: typer.Context, *own: str) -> dict[str, Any]:
    """The options by their names, but those of no value, unset switches and the command's ``own``; defaults stay."""
    given = {name: value for name, value in context.params.items() if name not in own}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def register(
    context: typer.Context,
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made where needed.")],
    bundle: Annotated[
        str | None,
        typer.Option(
            help="A trained bundle, a comparison (its best), or one that came with regpipe: resnet18, vgg16, alexnet. "
            "none: no network, each pair optimised from zero. Default: resnet18 in 2D, none in 3D.",
            autocompletion=completion.one_of(completion.SHIPPED),
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="In a bundle's place: symnet, with its authors' weights.",
            autocompletion=completion.one_of(completion.NETWORKS),
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Of --network symnet: its authors' .pth.")] = None,
    affine: Annotated[str | None, option(AffineOptions, "affine", completion.STAGES)] = None,
    affine_from: Annotated[str | None, option(AffineOptions, "affine_from")] = None,
    affine_metric: Metric = None,
    initial: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[,inverse]",
            help="With two files: a transform to start from, in the place of --affine none, else before it. Several "
            "by giving it again: in the order in which they move an image.",
        ),
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Steps of per-pair optimisation after the network's answer, or from zero.")
    ] = None,
    similarity: Similarity = None,
    smoothness: Smoothness = None,
    finest: Finest = None,
    guide: Annotated[str | None, option(RefinementOptions, "guide", completion.GUIDES, several=True)] = None,
    guide_labels: Annotated[
        str | None, typer.Option("--guide-labels", metavar="L,L", help="Of --guide labels: these alone lead.")
    ] = None,
    rigid: Annotated[
        str | None,
        typer.Option(metavar="all|L,L", help="Labels of the fixed image that stay rigid, each by a motion of its own."),
    ] = None,
    features: Annotated[str | None, option(RefinementOptions, "features", metavar="WHAT")] = None,
    channel_weights: Annotated[str | None, option(RefinementOptions, "channel_weights", metavar="W,W")] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="all|I,I",
            help="Images of several values at each place (4D, colours) are such channels: all, or which, from 0.",
        ),
    ] = None,
    fixed_channel: Annotated[
        list[Path] | None,
        typer.Option("--fixed-channel", help="With two files: one more of FIXED, on its grid; may be given again."),
    ] = None,
    moving_channel: Annotated[
        list[Path] | None, typer.Option("--moving-channel", help="With two files: the same of MOVING, in that order.")
    ] = None,
    formats: Formats = None,
    fixed_label: Annotated[Path | None, typer.Option(help="With two files: label map of FIXED.")] = None,
    moving_label: Annotated[Path | None, typer.Option(help="With two files: label map of MOVING.")] = None,
    fixed_mask: Annotated[Path | None, typer.Option(help="With two files: where FIXED counts.")] = None,
    moving_mask: Annotated[Path | None, typer.Option(help="With two files: where MOVING counts.")] = None,
    fixed_ignore: Annotated[
        Path | None, typer.Option(help="With two files: what of FIXED does not count, a lesion say.")
    ] = None,
    moving_ignore: Annotated[Path | None, typer.Option(help="With two files: what of MOVING does not count.")] = None,
    landmarks: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="FIXED MOVING",
            help="With two files: corresponding points, by their names or rows (.csv .fcsv .mrk.json .tag).",
        ),
    ] = None,
    fill: Fill = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            "--memory-gib",
            "--memory_gib",  # as a bundle spells it, and messages
            help="What this process may take; default: what is free. Where it is too little, see below.",
        ),
    ] = None,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty", help="Also how far off each place may be, mm: uncertainty.nii.gz. Seven times the time."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 where a result should not be trusted unseen: docs/trust.md.")
    ] = False,
    pairing: Annotated[
        str | None,
        typer.Option(
            help="Of a folder of subjects: all ordered pairs, or each onto the first; default: as trained.",
            autocompletion=completion.one_of(completion.PAIRINGS),
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Of a folder: so many pairs at a time, each in a process of one thread.")
    ] = 1,
    trust: Trust = False,
) -> None:
    """Register a folder of pairs, or one pair: by a network that came with regpipe, refined, or by one of your own.

    Each case gets a folder with the warped image and labels, the transforms both ways (for ITK, ANTs and Slicer), the
    Jacobian, pictures and metrics. Finished cases are skipped; a bad one is reported and the others go on. Where memory
    would not do, what costs least is given up first, and said: bfloat16, coarser refinement, the network on tiles.
    """
    if len(inputs) > 2:
        raise InputError(f"{len(inputs)} inputs: give one folder, or FIXED and MOVING")
    from regpipe.inference.register import BESIDE, one_pair, register_files
    from regpipe.transforms.initial import named

    given = asked(context, "inputs", "out", "landmarks", "initial", "fixed_channel", "moving_channel")
    beside = {name: Path(given.pop(name)) for name in BESIDE if name in given}
    beside |= zip(("fixed_landmarks", "moving_landmarks"), landmarks or (), strict=False)
    more = fixed_channel or [], moving_channel or []
    if jobs == 1 or len(inputs) == 2:
        del given["jobs"]
    with tempfile.TemporaryDirectory() as aside:
        dataset = inputs[0]
        if len(inputs) == 1 and dataset.is_file() and dataset.suffix.lower() != ".json":
            raise InputError(f"{dataset}: is one image; give FIXED and MOVING, or a folder of pairs")
        if len(inputs) == 2:
            images: dict[str, Any] = {"fixed_image": [inputs[0], *more[0]], "moving_image": [inputs[1], *more[1]]}
            dataset = one_pair(Path(aside) / "pair.json", {**images, **beside, **named(initial or ())})
        elif initial or beside or any(more):
            told = "labels, masks, channels, --landmarks and --initial"
            raise InputError(f"{told} go with two files; a datalist holds its own")
        register_files(dataset, out, **given)

"""``regpipe register``: a folder of pairs, or two files, with a bundle or without any."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from regpipe.cli import completion
from regpipe.cli.apply import Fill
from regpipe.utils.errors import InputError

Finest = Annotated[
    int | None,
    typer.Option(min=1, help="Of refinement: 1 compares at full resolution, 2 at half, faster; default: by size."),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help=f"Transform files, by commas: {', '.join(completion.FORMATS).replace('ants', 'ants (by default)')}.",
        autocompletion=completion.some_of(completion.FORMATS),
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--affine-metric",
        "--affine_metric",  # as a bundle spells it, and messages
        help="What images are aligned by: mi (default), or ncc within a modality.",
        autocompletion=completion.one_of(completion.METRICS),
    ),
]
Similarity = Annotated[
    str | None,
    typer.Option(
        help=f"What refinement compares images by: {', '.join(completion.SIMILARITIES)}.",
        autocompletion=completion.one_of(completion.SIMILARITIES),
    ),
]
Smoothness = Annotated[
    float | None, typer.Option(help="Of refinement; 1: the default, 0.5 follows the images further.")
]
Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="FOLDER | FIXED MOVING", help="A folder (or datalist) of pairs, or two image files."),
]

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run a bundle whose configuration is not regpipe's own: it can run any code."),
]


def register(
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
    affine: Annotated[
        str | None,
        typer.Option(
            help="First: none, centre, rigid, similarity, affine, projective (2D). Default: affine; a bundle: its own.",
            autocompletion=completion.one_of(completion.STAGES),
        ),
    ] = None,
    affine_from: Annotated[
        str | None,
        typer.Option(
            "--affine-from",
            "--affine_from",  # as a bundle spells it, and messages
            help="What rigid and more are found by: images (default), landmarks, both.",
            autocompletion=completion.one_of(completion.SOURCES),
        ),
    ] = None,
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
        int | None,
        typer.Option(help="Steps of per-pair optimisation after the network's answer, or from zero."),
    ] = None,
    similarity: Similarity = None,
    smoothness: Smoothness = None,
    finest: Finest = None,
    guide: Annotated[
        str | None,
        typer.Option(
            help="Of refinement: what of the pair's own leads it too: labels, landmarks, or both with a comma.",
            autocompletion=completion.some_of(completion.GUIDES),
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Of --similarity features: resnet18 (default), vgg16, alexnet, BACKBONE:WEIGHTS, or a TorchScript "
            "file, FILE.ts or FILE.ts=1,0.5 with weights.",
        ),
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
    given: dict[str, Any] = {"pairing": pairing, "formats": formats, "memory_gib": memory_gib, "strict": strict or None}
    given["uncertainty"] = uncertainty or None
    given |= {"fill": fill}
    given |= {"affine": affine, "affine_from": affine_from, "affine_metric": affine_metric}
    given |= {"refine": refine, "similarity": similarity, "smoothness": smoothness, "finest": finest}
    given |= {"guide": guide, "features": features}
    given |= {"network": network, "weights": None if weights is None else str(weights)}
    given["jobs"] = jobs if jobs > 1 and len(inputs) == 1 else None
    chosen = {name: value for name, value in given.items() if value is not None}
    points = landmarks or (None, None)
    beside = {"fixed_label": fixed_label, "moving_label": moving_label, "fixed_mask": fixed_mask}
    beside |= {"fixed_ignore": fixed_ignore, "moving_ignore": moving_ignore, "moving_mask": moving_mask}
    beside |= {"fixed_landmarks": points[0], "moving_landmarks": points[1]}
    from regpipe.inference.register import one_pair, register_files
    from regpipe.transforms.initial import named

    with tempfile.TemporaryDirectory() as aside:
        dataset = inputs[0]
        if len(inputs) == 1 and dataset.is_file() and dataset.suffix.lower() != ".json":
            raise InputError(f"{dataset}: is one image; give FIXED and MOVING, or a folder of pairs")
        if len(inputs) == 2:
            images = {"fixed_image": inputs[0], "moving_image": inputs[1]}
            dataset = one_pair(Path(aside) / "pair.json", images | beside | named(initial or ()))
        elif initial or any(beside.values()):
            raise InputError("labels, masks, --landmarks and --initial go with two files; a datalist holds its own")
        register_files(dataset, out, bundle=bundle, trust=trust, **chosen)

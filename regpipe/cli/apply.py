"""``regpipe apply`` and ``regpipe compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regpipe.cli import completion
from regpipe.utils import console

Reference = Annotated[Path | None, typer.Option(help="Image whose grid the result gets.")]
Fill = Annotated[
    float | None,
    typer.Option(
        metavar="VALUE", help="Outside of images, nan too; default: what each has itself outside. Of label maps 0."
    ),
]
Manifest = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Write hashes of what goes in and comes out: docs/provenance.md."),
]


def apply(
    transform: Annotated[
        Path,
        typer.Argument(
            metavar="CASE | TRANSFORM",
            help="Folder of a registered case; or a file: .h5 .tfm .txt .mat, or a displacement .nii.gz.",
        ),
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Images, label maps, points (.csv .fcsv .mrk.json .tag), meshes (.vtk .stl)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results, or one file's name.")],
    to: Annotated[
        str,
        typer.Option(
            help="fixed: carry what belongs to the moving image to the fixed one; moving: back.",
            autocompletion=completion.one_of(("fixed", "moving")),
        ),
    ] = "fixed",
    reference: Reference = None,
    interpolation: Annotated[
        str,
        typer.Option(
            help="Of images: linear, bspline, nearest, label (each label linearly, the largest wins); "
            "auto: nearest for label maps (files that say so; whole numbers, where the name ends so, like a_seg.nii.gz "
            "or labels/a.nii.gz, or the voxels fill regions), else linear.",
            autocompletion=completion.one_of(completion.INTERPOLATIONS),
        ),
    ] = "auto",
    fill: Fill = None,
    manifest: Manifest = None,
) -> None:
    """Carry images, labels, points and meshes through a registration, each image resampled once.

    With a case, points go where the moved image shows them. A transform file alone maps points as it says, for most
    files from the fixed image to the moving one, and pulls images onto the grid of --reference.
    """
    from regpipe.data import manifest as manifests
    from regpipe.transforms.apply import apply as run

    if manifest is not None:
        manifests.check_beside(manifest, out)
    problems: dict[str, str] = {}
    written = run(
        transform, inputs, out, to=to, reference=reference, interpolation=interpolation, fill=fill, problems=problems
    )
    if manifest is not None and written:
        used = {"transform": [transform], "input": [path for path in inputs if str(path) not in problems]}
        used |= {"reference": [reference]} if reference else {}
        settings = {"to": to, "interpolation": interpolation, **({} if fill is None else {"fill": str(fill)})}
        manifests.of_files(manifest, "application", used, written, settings)
    console.tell(problems=problems)
    for problem in problems.values():
        console.complain("error", problem)
    if problems:
        raise typer.Exit(1)


def compose(
    transforms: Annotated[
        list[Path],
        typer.Argument(
            metavar="CASE | TRANSFORM...", help="In the order in which they move an image: the first one's first."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help=".h5: a chain, nothing resampled; .nii.gz: a displacement, LPS mm.")
    ],
    reference: Reference = None,
    manifest: Manifest = None,
) -> None:
    """Chain transforms into one file; of a case folder, its way to the fixed image is taken."""
    from regpipe.data import manifest as manifests
    from regpipe.transforms.apply import compose as run

    if manifest is not None:
        manifests.check_beside(manifest, out)
    file = run(transforms, out, reference=reference)
    if manifest is not None:
        used = {"transform": transforms, **({"reference": [reference]} if reference else {})}
        manifests.of_files(manifest, "composition", used, [file], {})
    console.tell(file=file)
    print(file)

"""``regpipe apply``, ``regpipe compose`` and ``regpipe jacobian``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regpipe.cli import completion
from regpipe.utils import console

Transform = Annotated[
    Path,
    typer.Argument(
        metavar="CASE | TRANSFORM",
        help="Folder of a registered case; or a file: .h5 .tfm .txt .mat, or a displacement .nii.gz.",
    ),
]
To = Annotated[
    str,
    typer.Option(
        help="fixed: carry what belongs to the moving image to the fixed one; moving: back.",
        autocompletion=completion.one_of(("fixed", "moving")),
    ),
]
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
    transform: Transform,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Images, label maps, points (.csv .fcsv .mrk.json .tag), meshes (.vtk .stl)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results, or one file's name.")],
    to: To = "fixed",
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
    modulate: Annotated[
        bool, typer.Option("--modulate", help="Times the change of volume: sum times voxel size stays; outside is 0.")
    ] = False,
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
    how: dict[str, Any] = {"interpolation": interpolation, "fill": fill, "modulate": modulate}
    written = run(transform, inputs, out, to=to, reference=reference, problems=problems, **how)
    if manifest is not None and written:
        used = {"transform": [transform], "input": [path for path in inputs if str(path) not in problems]}
        used |= {"reference": [reference]} if reference else {}
        settings: dict[str, Any] = {"to": to, "interpolation": interpolation}
        settings |= {} if fill is None else {"fill": str(fill)}
        settings |= {"modulate": True} if modulate else {}
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


def jacobian(
    transform: Transform,
    out: Annotated[Path, typer.Option("--out", "-o", help="The map's file: .nii.gz, .mha, .nrrd.")],
    to: Annotated[
        str,
        typer.Option(
            help="On the grid of the fixed or the moving image.", autocompletion=completion.one_of(("fixed", "moving"))
        ),
    ] = "fixed",
    reference: Reference = None,
    log: Annotated[bool, typer.Option("--log", help="The logarithm: 0 where the volume stays.")] = False,
    strain: Annotated[
        bool, typer.Option("--strain", help="Green-Lagrange's strain tensor instead, LPS: 0 where it moves rigidly.")
    ] = False,
    labels: Annotated[
        Path | None, typer.Option(help="Label map on that grid: the change of each region too, in OUT_labels.csv.")
    ] = None,
) -> None:
    """How much larger each voxel's place is in the other image: the determinant of the Jacobian.

    2 on the fixed image's grid: there the moving image is twice as large. Of labels the mean is that of the region as
    a whole; p5 and p95 are of its voxels. With --strain it is the mean of the largest and smallest principal strain.
    """
    from regpipe.transforms.volume import jacobian as run

    rows = run(transform, out, to=to, reference=reference, log=log, strained=strain, labels=labels)
    console.tell(file=out, regions=rows)
    for row in rows:
        label, _, *told = row.values()
        what = ("stretched by", "at least") if strain else ("times",)
        of = (
            f"{word} {mean:.3f} (5 to 95 % of its voxels: {low:.3f} to {high:.3f})"
            for word, mean, low, high in zip(what, told[::3], told[1::3], told[2::3], strict=True)
        )
        print(f"label {label}: {', '.join(of)}")
    print(out)

"""``regpipe template``: a group of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regpipe.cli import completion
from regpipe.cli.register import Finest, Formats, Metric, Similarity, Smoothness, asked
from regpipe.utils import console


def template(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(help="A folder (or datalist) of subjects, with labels/ and masks/ or not; or a film.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made where needed.")],
    bundle: Annotated[
        str | None,
        typer.Option(
            help="Whose network the first round begins with; none: from zero. Default: resnet18 in 2D, none in 3D.",
            autocompletion=completion.one_of(completion.SHIPPED),
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Of deformation; 0: an affine template.")] = 3,
    within: Annotated[
        str | None,
        typer.Option(
            metavar="SUBJECT",
            help="Each subject's own mean first: 'subject' (groups.csv, sub-..., else what is before the last _), "
            "or a regular expression that finds it in an image's name.",
        ),
    ] = None,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="FOLDER is a film, or its frames in order: motion is smooth over time.")
    ] = False,
    over_time: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of --sequence: motion to and fro within so many frames is noise; 0: none is."),
    ] = None,
    affine: Annotated[
        str | None,
        typer.Option(
            help="First: none, centre, rigid, similarity, affine. Default: affine, of a sequence none.",
            autocompletion=completion.one_of(completion.STAGES),
        ),
    ] = None,
    affine_metric: Metric = None,
    refine: Annotated[int | None, typer.Option(min=1, help="Steps of each subject's first round.")] = None,
    similarity: Similarity = None,
    smoothness: Smoothness = None,
    finest: Finest = None,
    formats: Formats = None,
    jobs: Annotated[int, typer.Option(min=1, help="So many subjects at a time, each in a process of one thread.")] = 1,
) -> None:
    """The mean of a group of images, and every subject's transform to it, both ways.

    No subject is the reference: the order of the files does not count, and what is common to all transforms is taken
    out of them. OUT holds the template, of labels what the subjects vote for, and a folder for each subject as regpipe
    register writes it. Stopped, the same command goes on: docs/template.md.
    """
    from regpipe.group.run import make_template

    given = asked(context, "folder", "out", "formats")
    given |= {} if formats is None else {"formats": [name.strip() for name in formats.split(",")]}
    about = make_template(folder, out, **given)
    console.tell(folder=out, **about)
    sharper = " -> ".join(f"{told['sharpness']:.4f}" for told in about["stages"])
    print(f"{len(about['subjects'])} subjects; sharpness {sharper}; template in {out / 'template.nii.gz'}")
    for name, number in about.get("film", {}).items():
        print(f"{name.replace('_', ' ')} {number:.4g}")

"""``regpipe bids``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regpipe.cli import completion
from regpipe.utils import console


def bids(
    root: Annotated[Path, typer.Argument(metavar="BIDS", help="Folder with dataset_description.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The datalist, .json.")] = Path("datalist.json"),
    pairing: Annotated[
        str,
        typer.Option(
            help="sessions: of each subject, every other session onto its fixed one; subjects: all ordered pairs of "
            "different subjects in that session; modalities: --moving-suffix onto --suffix, within a session.",
            autocompletion=completion.one_of(completion.BIDS_PAIRINGS),
        ),
    ] = "sessions",
    suffix: Annotated[str, typer.Option(help="Of the images: T1w, T2w, bold ...")] = "T1w",
    moving_suffix: Annotated[str | None, typer.Option(help="Of the moving images, where it is another.")] = None,
    desc: Annotated[
        str | None, typer.Option(help="Take derivatives' images of this desc, e.g. preproc; default: the raw ones.")
    ] = None,
    label_desc: Annotated[str | None, typer.Option(help="Which dseg, where there are several: aseg ...")] = None,
    fixed_session: Annotated[
        str | None, typer.Option(help="Whose images are fixed; default: a subject's first.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Subjects to validate with: a fraction, or how many.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of which subjects.")] = 0,
) -> None:
    """Pair the images of a BIDS data set into a datalist, with derivatives' label maps (dseg) where there are any.

    No subject is in both training and validation. The datalist is what --dataset_dir and regpipe register take.
    """
    from regpipe.data.bids import write_datalist

    how: dict[str, Any] = {"pairing": pairing, "suffix": suffix, "moving_suffix": moving_suffix, "desc": desc}
    how |= {"label_desc": label_desc, "fixed_session": fixed_session, "holdout": holdout, "seed": seed}
    found = write_datalist(root, out, **how)
    console.tell(datalist=out, **found)
    print(
        f"{out}: {found['training']} pairs to train with, {found['validation']} to validate, {found['labels']} labelled"
    )

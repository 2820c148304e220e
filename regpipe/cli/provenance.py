"""``regpipe verify`` and ``regpipe rerun``: are results unchanged, and are they reproduced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regpipe.cli.register import Trust
from regpipe.utils import console
from regpipe.utils.errors import InputError

if TYPE_CHECKING:
    from regpipe.provenance.rerun import Again

Data = Annotated[Path | None, typer.Option(help="Folder below which the images lie.")]


def verify(
    folder: Annotated[
        Path, typer.Argument(help="What register wrote, one case; a bundle, comparison or study; a manifest.")
    ],
    data: Data = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Whose weights they are to be: the one that the cases were registered with.")
    ] = None,
) -> None:
    """Check that results are what was written: each file's hash against the manifest that was written with it.

    With --data also that the images, labels and landmarks are there and unchanged; with --bundle the weights.
    """
    from regpipe.provenance.verify import verify as run

    checked = run(folder, data=data, bundle=bundle)
    console.tell(results=checked.results, checked=checked.files, problems=checked.problems)
    for problem in checked.problems.values():
        console.complain("error", problem)
    console.say(f"{checked.results} results, {checked.files} files, {len(checked.problems)} problems")
    if checked.problems:
        raise typer.Exit(1)


def rerun(
    manifest: Annotated[Path, typer.Argument(help="manifest.json of a registered case; its folder, or one of cases.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep what comes out here; default: nowhere.")] = None,
    data: Data = None,
    bundle: Annotated[Path | None, typer.Option(help="The one that the cases were registered with.")] = None,
    trust: Trust = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="That a displacement may be off, in mm; default: same to the bit.")
    ] = 0.0,
) -> None:
    """Register cases again with the same settings and compare: the same to the bit, or how far off.

    Without --data the images are looked for near the results.
    """
    from regpipe.provenance.rerun import rerun as run

    if out is not None and out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; what lies there might be taken for what comes out: give another --out")
    found = run(manifest, out, data=data, bundle=bundle, trust=trust)
    console.tell(folder=out, cases=[again._asdict() for again in found])
    for again in found:
        console.say(_told(again))
    if not all(not again.different or (again.off and again.off[1] <= tolerance > 0) for again in found):
        raise typer.Exit(1)


def _told(again: Again) -> str:
    changed = "; ".join(f"{name}: {then} then, {now} now" for name, (then, now) in again.conditions.items())
    among = f" ({changed})" if changed else ""
    if not again.different:
        return f"{again.case}: the same to the bit, {again.files} files{among}"
    off = "no displacement to compare"
    if again.off is not None:
        off = f"displacement off by {again.off[0]:.2g} mm, at most {again.off[1]:.2g}"
    return f"{again.case}: {len(again.different)} of {again.files} files differ, {off}{among}"

"""The commands that show results: ``regpipe report``, ``validate``, ``dashboard`` and ``figures``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regpipe.utils import console
from regpipe.utils.errors import InputError


def report(
    folder: Annotated[Path, typer.Argument(help="What regpipe register or a bundle's inference wrote; or one case.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A folder of its own for page and pictures, to hand on; default: FOLDER."),
    ] = None,
    single_file: Annotated[bool, typer.Option("--single-file", help="Pictures inside the page, for mailing.")] = False,
    thresholds: Annotated[
        Path | None, typer.Option(help="YAML with a line per metric: tre: [3, 6] (warn, fail), or off.")
    ] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="NAME=WARN,FAIL or NAME=off; may be repeated.")] = None,
) -> None:
    """Write report.html: all cases, the worst first, and each one's images to compare, outlines, grid and Jacobian.

    Open it in any browser; it loads nothing from the network. How to read it and the thresholds: docs/report.md.
    """
    from regpipe.metrics.thresholds import thresholds as chosen
    from regpipe.report.qc_page import write_report

    page, cases = write_report(folder, chosen(thresholds, threshold or ()), out=out, single_file=single_file)
    counts = {kind: sum(case.verdict.status == kind for case in cases) for kind in ("fail", "warn", "pass")}
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    verdicts = [{"case": case.name, "verdict": case.verdict.status} for case in cases]
    console.tell(page=page, cases=verdicts, **counts)
    console.say(f"{page}: {len(cases)} case{'s' * (len(cases) != 1)} ({told}), {page.stat().st_size / 1e6:.1f} MB")


def validate(
    folder: Annotated[Path, typer.Argument(help="What regpipe register -o wrote.")],
    truth: Annotated[
        Path, typer.Option(help="Data set of the same cases: landmarks, label maps, displacements/ (regpipe phantom).")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for both files; default: FOLDER.")] = None,
) -> None:
    """Hold finished cases to a truth: TRE, Dice, HD95, end-point error, with bootstrap intervals, and checkerboards.

    Writes validation.csv and validation.html. All is measured on the files that were written, in mm of native space.
    """
    from regpipe.study.validation import PAGE, TABLE
    from regpipe.study.validation import validate as run

    rows, problems = run(folder, truth, out)
    target = out or folder
    console.tell(table=target / TABLE, page=target / PAGE, rows=[row._asdict() for row in rows], problems=problems)
    for row in rows[-len({row.measure for row in rows}) :]:
        unit = f" {row.unit}" if row.unit else ""
        told = f"{row.before:.3g} -> {row.after:.3g}{unit} (95 % interval {row.low:.3g} to {row.high:.3g})"
        print(f"{row.measure}: {told}, {row.n} case{'s' * (row.n != 1)}")
    print(f"table: {target / TABLE}, page: {target / PAGE}")
    for name, problem in problems.items():
        console.complain("error", f"{name}: {problem}")
    if problems:
        raise typer.Exit(1)


def dashboard(
    folder: Annotated[Path, typer.Argument(help="Folder of a bundle, of regpipe compare, or of several of them.")],
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; default: the first free one from 6006 on.")
    ] = None,
) -> None:
    """Show training curves, pictures, settings and results in TensorBoard, on 127.0.0.1 alone, until Ctrl-C.

    What each tab shows: docs/dashboard.md
    """
    from regpipe.cli.dashboard import serve

    serve(folder, port=port)


def figures(
    folder: Annotated[Path, typer.Argument(help="Folder with comparison.csv, or with study.csv and effects.csv.")],
) -> None:
    """Make the page and the figures of a comparison or a study again, from their CSVs alone; nothing is trained."""
    from regpipe.data import manifest
    from regpipe.study import compare_page
    from regpipe.study import page as study_page

    writers = {"comparison.csv": compare_page, "study.csv": study_page}
    found = {name: page for name, page in writers.items() if (folder / name).is_file()}
    if not found:
        wanted = " nor ".join(writers)
        raise InputError(f"{folder}: holds neither {wanted}; regpipe compare and regpipe study write them")
    pages = []
    for name, page in found.items():
        page.write_page(folder)
        manifest.renew(folder, page.PAGE)
        pages.append((folder / name).with_suffix(".md"))
        console.tell(pages=pages)
        console.say(f"page: {pages[-1]}; figures beside it, SVG and PNG")

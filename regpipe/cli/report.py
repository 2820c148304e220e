"""``regpipe report``: the page that registered cases are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regpipe.utils import console


def add(app: typer.Typer) -> None:
    """Give ``app`` the command."""
    app.command()(report)


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

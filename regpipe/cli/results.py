"""The command line's part that shows results: dashboard, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regpipe.utils import console
from regpipe.utils.errors import InputError


def add(app: typer.Typer) -> None:
    """Give the command line its ``dashboard`` and ``figures``."""
    app.command()(dashboard)
    app.command()(figures)


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

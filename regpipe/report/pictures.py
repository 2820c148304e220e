"""Pictures of a registered pair: before and after, checkerboard, deformed grid, Jacobian map.

A picture is (H, W, 3) uint8. Array axis 0 runs to the right; axis 1 runs downwards for a 2-D image (as in an image
viewer) and upwards for a slice of a 3-D volume in RAS order, which is cut across its last axis. One voxel becomes a
square of k x k pixels, k the same for every picture of a pair.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from regpipe.fields.algebra import jacobian_determinant
from regpipe.utils.files import replace_hashed

Array = NDArray[np.floating]
Picture = NDArray[np.uint8]

# The captions; the keys are those of ``pictures``.
TITLES = {
    "fixed": "fixed",
    "moving": "moving",
    "warped": "moving, warped",
    "checkerboard": "checkerboard: fixed / warped",
    "overlay": "fixed magenta; before | after in green",
    "grid": "fixed grid, carried by x + u(x)",
    "jacobian": "local volume change",
}
SHORTEST_SIDE = 256  # pixels
SQUARES = 8  # of the checkerboard, along the shorter side
LINES = 16  # of the grid, along the shorter side
GAP = 4  # pixels between pictures
SHEET_WIDTH, CELL_HEIGHT = 1200, 256  # pixels: where rows of the contact sheet break; of each picture on it
DPI = 128  # a power of two: pixels / DPI is exact and no figure loses a row to rounding
FOLD = "red"
FOREGROUND = 0.1  # of an image in [0, 1]


class Slice(NamedTuple):
    """The slice of one pair that is drawn."""

    displacement: Array  # (2, X, Y) in voxels, the part that lies in the plane
    determinant: Array  # (X, Y) of the whole map, motion across the plane included
    title: str  # range of the determinant and folds, over the whole volume
    origin: str  # where voxel (0, 0) lies: ``upper`` or ``lower`` left
    scale: int  # pixels per voxel


def pictures(
    fixed: ArrayLike,
    moving: ArrayLike,
    warped: ArrayLike,
    displacement: ArrayLike,
) -> dict[str, Picture]:
    """The pictures of one registered pair, by name; the names are the keys of ``TITLES``.

    Args:
        fixed, moving, warped: (*S) in [0, 1] on one grid, 2-D or 3-D.
        displacement: (D, *S) in voxels, ``warped(x) = moving(x + u(x))``.
    """
    images = [np.asarray(image, float) for image in (fixed, moving, warped)]
    u = np.asarray(displacement, np.float32)
    at = _content(images[0])
    view = _slice(u, at)
    f, m, w = (_enlarged(_plane(image, at), view) for image in images)
    return {
        "fixed": _grey(f),
        "moving": _grey(m),
        "warped": _grey(w),
        "checkerboard": _grey(_checkerboard(f, w, view.scale)),
        "overlay": _beside(np.dstack([f, m, f]), np.dstack([f, w, f])),
        "grid": _grid(f, view),
        "jacobian": _jacobian(view),
    }


def _content(volume: Array) -> int:
    """The slice in the middle of the foreground, half of it to either side: a head seldom fills its scan."""
    share = np.cumsum((volume > FOREGROUND).sum(axis=tuple(range(volume.ndim - 1))))
    return int(np.searchsorted(share, share[-1] / 2)) if share[-1] else len(share) // 2


def _plane(volume: Array, at: int) -> Array:
    """One slice of a volume; an image (X, Y) is its own."""
    return volume if volume.ndim == 2 else volume[..., at]


def _slice(u: Array, at: int) -> Slice:
    det = jacobian_determinant(torch.from_numpy(u)[None])[0].numpy()
    folds = 100 * np.mean(~(det > 0))  # NaN is a fold
    title = f"det J {np.nanmin(det):.2f} to {np.nanmax(det):.2f}, folds {folds:.2g} %"
    plane = np.stack([_plane(channel, at) for channel in u[:2]])
    scale = -(-SHORTEST_SIDE // min(plane.shape[1:]))
    return Slice(plane, _plane(det, at), title, "upper" if len(u) == 2 else "lower", scale)


# ---------------------------------------------------------------------------------- drawn by pixels


def _enlarged(plane: Array, view: Slice) -> Picture:
    """(X, Y) in [0, 1] -> (H, W) uint8 as on the screen, k x k pixels per voxel."""
    grey = (255 * np.clip(np.nan_to_num(plane), 0, 1)).round().astype(np.uint8)
    upright = grey.T if view.origin == "upper" else grey.T[::-1]
    height, width = upright.shape
    size = (width * view.scale, height * view.scale)
    return np.asarray(Image.fromarray(upright).resize(size, Image.Resampling.BICUBIC))


def _grey(picture: Picture) -> Picture:
    return np.repeat(picture[..., None], 3, axis=-1)


def _checkerboard(fixed: Picture, warped: Picture, scale: int) -> Picture:
    """Squares of ``fixed`` (at the upper left) and of ``warped`` in turn, of whole voxels."""
    side = scale * max(1, round(min(fixed.shape) / scale / SQUARES))
    rows, columns = np.indices(fixed.shape) // side
    return np.where((rows + columns) % 2 == 0, fixed, warped)


def _beside(left: Picture, right: Picture) -> Picture:
    gap = np.full((len(left), GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


# ------------------------------------------------------------------------------ drawn by matplotlib


def _canvas(width: int, height: int) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    return figure, FigureCanvasAgg(figure)


def _drawn(canvas: FigureCanvasAgg) -> Picture:
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _frame(axes: Axes, shape: tuple[int, ...], origin: str) -> None:
    """Voxel coordinates on ``axes``: x is array axis 0, y is array axis 1."""
    low, high = (shape[1] - 0.5, -0.5) if origin == "upper" else (-0.5, shape[1] - 0.5)
    axes.set(xlim=(-0.5, shape[0] - 0.5), ylim=(low, high), xticks=[], yticks=[])


def _grid(fixed: Picture, view: Slice) -> Picture:
    """Lines of the fixed grid where x + u(x) takes them, over the (dimmed) fixed image."""
    shape = view.displacement.shape[1:]
    step = max(1, round(min(shape) / LINES))
    where = np.moveaxis(np.indices(shape) + view.displacement, 0, -1)  # (X, Y, 2)
    first = step // 2
    lines = [*where[first::step], *where[:, first::step].swapaxes(0, 1)]
    figure, canvas = _canvas(fixed.shape[1], fixed.shape[0])
    axes = figure.add_axes((0, 0, 1, 1), frameon=False)
    _frame(axes, shape, view.origin)
    rim = (*axes.get_xlim(), *axes.get_ylim())
    axes.imshow(_grey(fixed) // 3 * 2, extent=rim, origin="upper", aspect="auto", interpolation="nearest")
    drawn = LineCollection(lines, colors="gold", linewidths=0.6)
    drawn.set_snap(False)  # else straight lines jump to whole pixels
    axes.add_collection(drawn, autolim=False)
    return _drawn(canvas)


def _jacobian(view: Slice) -> Picture:
    """det(I + grad u): 1 is white, shrinking purple, growing green, folded (det <= 0) red.

    The colours span 0 to 2 in every picture, so that pictures can be compared.
    """
    det = view.determinant
    width, height = (side * view.scale for side in det.shape)
    right, top, edge = 70, 28, 6  # pixels for the colour bar, the title and the rim
    wide, high = width + right + edge, height + top + edge
    figure, canvas = _canvas(wide, high)
    axes = figure.add_axes((edge / wide, edge / high, width / wide, height / high))
    colours = colormaps["PRGn"].with_extremes(under=FOLD, bad=FOLD)
    shown: Any = np.where(det <= 0, -1, det).T
    look: Any = {"vmin": 0, "vmax": 2, "origin": view.origin, "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(shown, cmap=colours, **look)
    folds = np.argwhere(~(det > 0))
    size = max(view.scale, 4) * 72 / DPI  # at least 4 pixels: one folded voxel must not be overlooked
    axes.plot(*folds.T, "s", color=FOLD, markersize=size, markeredgewidth=0)
    _frame(axes, det.shape, view.origin)
    bar = figure.add_axes(((edge + width + 10) / wide, edge / high, 16 / wide, height / high))
    figure.colorbar(image, cax=bar, extend="both", ticks=[0, 0.5, 1, 1.5, 2])
    bar.tick_params(labelsize=7)
    figure.text(edge / wide, 1 - top / 2 / high, view.title, fontsize=8, va="center")
    return _drawn(canvas)


# ----------------------------------------------------------------------------------- sheet and file


def contact_sheet(pictures: Mapping[str, Picture]) -> Picture:
    """Pictures of any sizes on one white sheet, each below its title from ``TITLES``; one at least."""
    cells = [_captioned(picture, TITLES[name]) for name, picture in pictures.items()]
    corners, x, y, widest = [], GAP, GAP, 0
    for cell in cells:
        if x > GAP and x + cell.width + GAP > SHEET_WIDTH:
            x, y = GAP, y + cell.height + GAP
        corners.append((x, y))
        x += cell.width + GAP
        widest = max(widest, x)
    sheet = Image.new("RGB", (widest, y + cells[0].height + GAP), "white")
    for cell, corner in zip(cells, corners, strict=True):
        sheet.paste(cell, corner)
    return np.asarray(sheet)


def _captioned(picture: Picture, title: str) -> Image.Image:
    image = Image.fromarray(picture)
    image = image.resize(
        (max(round(image.width * CELL_HEIGHT / image.height), 1), CELL_HEIGHT), Image.Resampling.LANCZOS
    )
    font = ImageFont.load_default(size=15)
    band = 24  # pixels
    width = max(image.width, round(font.getlength(title)) + 2 * GAP)
    cell = Image.new("RGB", (width, CELL_HEIGHT + band), "white")
    cell.paste(image, (0, band))
    ImageDraw.Draw(cell).text((GAP, band / 2), title, fill="black", font=font, anchor="lm")
    return cell


def save_png(path: str | Path, picture: Picture) -> str:
    """Write (H, W, 3) or (H, W) uint8 as PNG; folders are made. Returns its SHA-256."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return replace_hashed(path, buffer.getvalue())

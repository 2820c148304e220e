"""Pictures of a registration for people: before and after, checkerboard, bent grid, Jacobian map.

A picture is (H, W, 3) uint8. Array axis 0 runs to the right; axis 1 runs downwards for a 2-D image
(as in an image viewer) and upwards for a slice of a 3-D volume in RAS order, unless ``origin`` says
otherwise. One voxel becomes a square of k x k pixels, k the same for every picture of a pair.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from regpipe.fields.algebra import jacobian_determinant
from regpipe.report import views
from regpipe.utils.files import replace_hashed

Array = NDArray[np.floating]
Picture = NDArray[np.uint8]
Origin = Literal["upper", "lower"]

SHORTEST_SIDE = 256  # pixels
SQUARES = 8  # of the checkerboard, along the shorter side
LINES = 16  # of the grid, along the shorter side
GAP = 4  # pixels between pictures
FINER = 4  # lines are drawn so much larger, and are smooth when reduced
FOLD = (255, 0, 0)
FOREGROUND = 0.1  # of an image in [0, 1]


class Slice(NamedTuple):
    """What is drawn of one pair."""

    fixed: Picture  # (H, W) as on the screen, like the next two
    moving: Picture
    warped: Picture
    displacement: Array  # (2, X, Y) in voxels, the part that lies in the plane
    determinant: Array  # (X, Y) of the whole map, out-of-plane motion included
    title: str  # of the determinant, over the whole volume
    origin: Origin
    scale: int  # pixels per voxel


def pictures(
    fixed: ArrayLike,
    moving: ArrayLike,
    warped: ArrayLike,
    displacement: ArrayLike,
    *,
    axis: int = -1,
    origin: Origin | None = None,
    determinant: Array | None = None,
) -> dict[str, Picture]:
    """The pictures of one registered pair, by the names of ``PICTURES``.

    Args:
        fixed, moving, warped: (*S) in [0, 1] on one grid, 2-D or 3-D.
        displacement: (D, *S) in voxels, ``warped(x) = moving(x + u(x))``.
        axis: of a volume, the axis across which a slice is shown, amid what fixed shows; not used in 2-D.
        origin: where voxel (0, 0) lies, ``upper`` or ``lower`` left; default: upper in 2-D, lower
            in 3-D.
        determinant: of the displacement, (*S), where it is known.

    Raises:
        ValueError: if the shapes do not belong together, or for another ``origin``.
    """
    images = [np.asarray(image, float) for image in (fixed, moving, warped)]
    u = np.asarray(displacement, np.float32)
    _check(images, u, origin)
    at = _content(images[0], axis)
    if determinant is None:
        determinant = jacobian_determinant(torch.from_numpy(u)[None])[0].numpy()
    seen = _slice(images, u, determinant, axis, at, origin or ("upper" if len(u) == 2 else "lower"))
    return {name: kind.draw(seen) for name, kind in PICTURES.items()}


def case_pictures(
    batch: Mapping[str, Any], prediction: Mapping[str, torch.Tensor], determinant: torch.Tensor | None = None
) -> dict[str, np.ndarray]:
    """``pictures`` of the first case of a batch; ``determinant``: its own, (*S), where it is known."""

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().float().numpy()

    fixed, moving, warped = batch["fixed_image"], batch["moving_image"], prediction["warped_moving"]
    drawn = (*(image[0, 0] for image in (fixed, moving, warped)), prediction["displacement"][0])
    known = None if determinant is None else array(determinant)
    return pictures(*map(array, drawn), determinant=known)


def _check(images: list[Array], u: Array, origin: str | None) -> None:
    shape = u.shape[1:]
    if len(shape) not in (2, 3) or len(u) != len(shape) or any(i.shape != shape for i in images):
        raise ValueError(
            f"images {[i.shape for i in images]} and displacement {u.shape} do not belong "
            "together: expected three images (*S) and a displacement (D, *S), D = 2 or 3"
        )
    if origin not in (None, "upper", "lower"):
        raise ValueError(f"origin {origin!r} is unknown: 'upper' or 'lower'")


def _content(volume: Array, axis: int) -> int:
    """The slice in the middle of an image's foreground, half of it to either side: a head seldom fills its scan."""
    others = tuple(a for a in range(volume.ndim) if a != axis % volume.ndim)
    share = np.cumsum((volume > FOREGROUND).sum(axis=others))
    return int(np.searchsorted(share, share[-1] / 2)) if share[-1] else len(share) // 2


def _plane(volume: Array, axis: int, at: int) -> Array:
    """One slice of a volume; an image (X, Y) is its own."""
    return volume if volume.ndim == 2 else np.take(volume, at, axis)


def _slice(images: Sequence[Array], u: Array, det: Array, axis: int, at: int, origin: Origin) -> Slice:
    dim = len(u)
    normal = range(dim)[axis] if dim == 3 else None
    plane = np.stack([_plane(u[i], axis, at) for i in range(dim) if i != normal])
    folds = 100 * np.mean(~(det > 0))  # NaN is a fold
    title = f"det J {np.nanmin(det):.2f} to {np.nanmax(det):.2f}, folds {folds:.2g} %"
    scale = -(-SHORTEST_SIDE // min(plane.shape[1:]))
    fixed, moving, warped = (_enlarged(_plane(image, axis, at), origin, scale) for image in images)
    return Slice(fixed, moving, warped, plane, _plane(det, axis, at), title, origin, scale)


# ---------------------------------------------------------------------------------- drawn by pixels


def _enlarged(plane: Array, origin: Origin, scale: int) -> Picture:
    """(X, Y) in [0, 1] -> (H, W) uint8 as on the screen, k x k pixels for a voxel."""
    grey = (255 * np.clip(np.nan_to_num(plane), 0, 1)).round().astype(np.uint8)
    upright = grey.T if origin == "upper" else grey.T[::-1]
    height, width = upright.shape
    size = (width * scale, height * scale)
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


def _grid(view: Slice) -> Picture:
    """Lines of the fixed grid where x + u(x) takes them, over the (dimmed) fixed image."""
    shape = view.displacement.shape[1:]
    step = max(1, round(min(shape) / LINES))
    finer = FINER if view.scale > 1 else 2  # of large images less, for memory
    first, fine = step // 2, view.scale * finer
    where = np.moveaxis(np.indices(shape) + view.displacement, 0, -1)  # (X, Y, 2)
    if view.origin == "lower":
        where[..., 1] = shape[1] - 1 - where[..., 1]
    where = np.nan_to_num((where + 0.5) * fine)
    lines = Image.new("L", (shape[0] * fine, shape[1] * fine))
    pen = ImageDraw.Draw(lines)
    for line in (*where[first::step], *where[:, first::step].swapaxes(0, 1)):
        pen.line(line.ravel().tolist(), fill=255, width=finer)
    dimmed = Image.fromarray(_grey(view.fixed) // 3 * 2)
    dimmed.paste(views.GRID_COLOUR, mask=lines.reduce(finer))
    return np.asarray(dimmed)


def _jacobian(view: Slice) -> Picture:
    """det(I + grad u): 1 is white, shrinking purple, growing green, folded (det <= 0) red.

    The colours span 0 to 2 in every picture, so that pictures can be compared.
    """
    shown = view.determinant.T if view.origin == "upper" else view.determinant.T[::-1]
    colours = np.array(views.colours(views.CHANGE, 256), np.uint8)
    large = shown.repeat(view.scale, 0).repeat(view.scale, 1)
    height, width = large.shape
    drawn = colours[np.clip(128 * np.nan_to_num(large), 0, 255).astype(np.uint8)]
    folds = ~(large > 0)  # NaN is one
    drawn[ndimage.maximum_filter(folds, size=max(5 - view.scale, 1))] = FOLD  # 4 pixels at least, not to be overlooked
    right, top, edge = 70, 28, 6  # pixels for the colour bar, the title and the rim
    sheet = Image.new("RGB", (edge + width + right, top + height + edge), "white")
    sheet.paste(Image.fromarray(drawn), (edge, top))
    bar, left, bottom = Image.fromarray(colours[::-1, None].copy()), edge + width + 10, top + height
    sheet.paste(bar.resize((16, height)), (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((edge - 1, top - 1, edge + width, bottom), outline="black")
    pen.polygon([(left, bottom), (left + 15, bottom), (left + 7, bottom + edge - 1)], fill=FOLD)
    for determinant in (0, 0.5, 1, 1.5, 2):
        y = top + (height - 1) * (1 - determinant / 2)
        pen.line((left + 16, y, left + 19, y), fill="black")
        pen.text((left + 23, y), f"{determinant:.1f}", fill="black", font=_font(12), anchor="lm")
    pen.text((edge, top / 2), view.title, fill="black", font=_font(14), anchor="lm")
    return np.asarray(sheet)


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


class Kind(NamedTuple):
    """A kind of picture."""

    title: str  # on the sheet
    draw: Callable[[Slice], Picture]


PICTURES: dict[str, Kind] = {
    "fixed": Kind("fixed", lambda seen: _grey(seen.fixed)),
    "moving": Kind("moving", lambda seen: _grey(seen.moving)),
    "warped": Kind("moving, warped", lambda seen: _grey(seen.warped)),
    "checkerboard": Kind(
        "checkerboard: fixed / warped", lambda seen: _grey(_checkerboard(seen.fixed, seen.warped, seen.scale))
    ),
    "overlay": Kind(
        "fixed magenta; before | after in green",
        lambda seen: _beside(*(np.dstack([seen.fixed, other, seen.fixed]) for other in seen[1:3])),
    ),
    "grid": Kind("fixed grid, carried by x + u(x)", _grid),
    "jacobian": Kind("local volume change", _jacobian),
}


# ----------------------------------------------------------------------------------- sheet and file


def contact_sheet(
    pictures: Iterable[Picture], titles: Iterable[str], *, width: int = 1200, height: int = 256
) -> Picture:
    """Pictures on one white sheet, each under its title.

    Args:
        pictures: (H, W, 3) uint8 each, of any sizes.
        titles: one for each.
        width: of the sheet in pixels, where rows break; a wider picture gets a wider sheet.
        height: to which every picture is scaled, in pixels.

    Raises:
        ValueError: without pictures, or if there are more or fewer titles.
    """
    cells = [_captioned(p, t, height) for p, t in zip(pictures, titles, strict=True)]
    if not cells:
        raise ValueError("no picture to put on a contact sheet")
    corners, x, y, widest = [], GAP, GAP, 0
    for cell in cells:
        if x > GAP and x + cell.width + GAP > width:
            x, y = GAP, y + cell.height + GAP
        corners.append((x, y))
        x += cell.width + GAP
        widest = max(widest, x)
    sheet = Image.new("RGB", (widest, y + cells[0].height + GAP), "white")
    for cell, corner in zip(cells, corners, strict=True):
        sheet.paste(cell, corner)
    return np.asarray(sheet)


def _captioned(picture: Picture, title: str, height: int) -> Image.Image:
    image = Image.fromarray(picture)
    image = image.resize((max(round(image.width * height / image.height), 1), height), Image.Resampling.LANCZOS)
    font = _font(15)
    band = 24  # pixels
    width = max(image.width, round(font.getlength(title)) + 2 * GAP)
    cell = Image.new("RGB", (width, height + band), "white")
    cell.paste(image, (0, band))
    ImageDraw.Draw(cell).text((GAP, band / 2), title, fill="black", font=font, anchor="lm")
    return cell


def save_png(path: str | Path, picture: Picture) -> str:
    """Write (H, W, 3) or (H, W) uint8 as PNG; folders are made. Returns its SHA-256."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=3)  # by default 9 % smaller, in twice the time
    return replace_hashed(path, buffer.getvalue())

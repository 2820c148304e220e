"""The view of a registered case: pictures of its slices along each axis, through which the report scrolls.

A *plane* is a viewing direction: axial, coronal and sagittal of a volume, or the ``image`` itself in 2-D. A *layer* is
one kind of content: an image, outlines, the grid, the volume change. The slices of one layer lie side by side in one
picture, its *atlas*, so that scrolling loads nothing. All is on the fixed image's grid, its axes turned to the closest
RAS, and shown as in radiology: the patient's right on the left, anterior and superior up. A 2-D image is shown as in
an image viewer.

``view.json`` describes the layout of the atlases. They are 8-bit and of limited size (``TILE``, ``SLICES``): to look
at, not to measure in.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from PIL import Image as Picture
from PIL import ImageDraw

from regpipe.io.geometry import flipped, upright, voxel_size
from regpipe.utils.files import replace_hashed

FORMAT = "regpipe view 1"
FOLDER, NAME = "view", "view.json"  # in a case's folder
IMAGES = ("fixed", "before", "warped")  # before: the moving image through the alignment alone
SLICES = 40  # of a plane, at most
TILE = {2: 1024, 3: 192}  # pixels of the longer side of a slice, at most; by dimension
LINE_TILE = {2: 768, 3: 320}  # of what is drawn in lines, always
GRID_LINES = 16  # along the shorter side
QUALITY = 88  # of the grey pictures' WebP
FOREGROUND = 0.1  # of an image in [0, 1]
FARTHEST = 4.0  # mm of expected error with a colour of its own
LARGEST = 2.0  # volume change with a colour of its own
FOLD = (230, 25, 25)
# Okabe and Ito's orange and sky blue: told apart by everybody. The moving side is dashed besides.
COLOURS = {"fixed": (230, 159, 0), "before": (86, 180, 233), "warped": (86, 180, 233)}
GRID_COLOUR = (255, 215, 0)
# Colours from the lowest value to the highest, matplotlib's PRGn and inferno, which takes long to import: purple
# (shrunk) over white to green (grown); dark (sure) to bright.
CHANGE = "40004b 752982 9970ab c1a4ce e7d4e8 f6f7f6 d9f0d3 a5da9f 5aae61 1a7736 00441b"
ERROR = "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35"
ERROR += " f2ea69 fcffa4"
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis across each
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom


class Shown(NamedTuple):
    """A registered pair on the fixed image's grid."""

    affine: np.ndarray  # (D+1, D+1), voxel index -> RAS mm
    images: Mapping[str, np.ndarray]  # of IMAGES: (*S) in [0, 1]
    labels: Mapping[str, np.ndarray]  # of IMAGES, those there are: (*S) whole numbers
    displacement: np.ndarray  # (D, *S) LPS mm, alignment included
    determinant: np.ndarray  # (*S) of the map beyond the alignment
    alignment: np.ndarray  # (D+1, D+1), fixed point -> moving point, RAS mm
    error: np.ndarray | None = None  # (*S) to expect, mm


class Landmarks(NamedTuple):
    """Landmarks known in both images; places are RAS mm of the fixed image, (K, D)."""

    fixed: np.ndarray
    before: np.ndarray  # the moving ones, carried back by the alignment alone
    warped: np.ndarray  # the moving ones, carried back by the whole registration
    errors: np.ndarray  # (K, 2) mm in the moving image, before and after


class Plane(NamedTuple):
    """A viewing direction."""

    name: str
    axes: tuple[int, int]  # of the array: to the right and downwards on the screen
    across: int | None  # the axis that is scrolled along; None in 2-D
    slices: list[int]

    def cut(self, array: np.ndarray, at: int) -> np.ndarray:
        """One slice of (*S), or of the last axes of (D, *S), in array order."""
        if self.across is None:
            return array
        return np.moveaxis(array, self.across - 3, 0)[at]  # a view; np.take copies a turned volume whole

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """(A, B) in array order -> (H, W) as on the screen."""
        return plane.T if self.across is None else plane.T[::-1, ::-1]


def write_view(folder: Path, shown: Shown, landmarks: Landmarks | None = None) -> dict[str, str]:
    """Write the atlases of a case into ``folder``, and last ``view.json``, which describes them.

    Returns name -> SHA-256.
    """
    affine, shown = _canonical(shown)
    spacing, dim = voxel_size(affine), len(affine) - 1
    about, hashes = [], {}
    for plane in _planes(shown.images["fixed"]):
        shape = [shown.images["fixed"].shape[axis] for axis in plane.axes]
        size = [shape[i] * spacing[axis] for i, axis in enumerate(plane.axes)]  # mm
        tile = _fitting(shape, TILE[dim], enlarge=False)
        fine = _fitting(size, LINE_TILE[dim], enlarge=True)
        columns = math.ceil(math.sqrt(len(plane.slices)))
        for name, picture in _atlases(plane, shown, affine, (tile, fine), columns):
            hashes[f"{plane.name}_{name}"] = replace_hashed(folder / f"{plane.name}_{name}", picture)
        about.append(
            {"name": plane.name, "axes": plane.axes, "across": plane.across, "slices": plane.slices}
            | {"shape": shape, "mm": size, "tile": tile, "fine": fine, "columns": columns}
            | {"letters": LETTERS.get(plane.name, "")}
        )
    layers = [
        "grid",
        "jacobian",
        *([] if shown.error is None else ["uncertainty"]),
        *IMAGES,
        *(f"outline_{side}" for side in shown.labels),
    ]
    content = {"format": FORMAT, "planes": about, "layers": {name: _file(name) for name in layers}}
    content["landmarks"] = [] if landmarks is None else _rows(landmarks, np.linalg.inv(affine))
    return hashes | {NAME: replace_hashed(folder / NAME, json.dumps(content, separators=(",", ":")).encode())}


def _file(layer: str) -> str:
    """The end of an atlas's name."""
    return f"{layer}.webp" if layer in IMAGES else f"{layer}.png"


def _canonical(shown: Shown) -> tuple[np.ndarray, Shown]:
    """The affine and arrays with the axes closest to RAS, in 2-D to LPS, as pictures are stored."""

    def turned(array: np.ndarray) -> np.ndarray:
        return upright(array, shown.affine)[0]

    return upright(shown.determinant, shown.affine)[1], shown._replace(
        images={side: turned(image) for side, image in shown.images.items()},
        labels={side: turned(label) for side, label in shown.labels.items()},
        displacement=np.stack([turned(channel) for channel in shown.displacement]),
        determinant=turned(shown.determinant),
        error=None if shown.error is None else turned(shown.error),
    )


def _planes(fixed: np.ndarray) -> list[Plane]:
    """The planes; of a volume with at most ``SLICES`` slices each, among those with foreground."""
    if fixed.ndim == 2:
        return [Plane("image", (0, 1), None, [0])]
    planes = []
    for name, across in PLANES.items():
        a, b = (axis for axis in range(3) if axis != across)
        held = np.flatnonzero((fixed > FOREGROUND).any(axis=(a, b)))
        first, last = (held[0], held[-1]) if len(held) else (0, fixed.shape[across] - 1)
        at = np.linspace(first, last, min(SLICES, last - first + 1)).round().astype(int)
        planes.append(Plane(name, (a, b), across, at.tolist()))
    return planes


def _fitting(size: list[float], longest: int, *, enlarge: bool) -> list[int]:
    """Width and height in pixels, in proportion; the longer is at most ``longest``, with ``enlarge`` exactly."""
    scale = longest / max(size)
    scale = scale if enlarge else min(1.0, scale)
    return [max(1, round(side * scale)) for side in size]


def _atlases(
    plane: Plane, shown: Shown, affine: np.ndarray, tiles: tuple[list[int], list[int]], columns: int
) -> list[tuple[str, bytes]]:
    """The end of the file name and the bytes of each layer of a plane."""
    tile, fine = tiles

    def atlas(array: np.ndarray, draw: Any) -> np.ndarray:
        return _together([draw(plane.upright(plane.cut(array, at))) for at in plane.slices], columns)

    found = [(_file(side), _webp(atlas(image, lambda cut: _grey(cut, tile)))) for side, image in shown.images.items()]
    for side, label in shown.labels.items():
        drawn = atlas(label, lambda cut, side=side: _outline(cut, fine, dashed=side != "fixed"))
        found.append((_file(f"outline_{side}"), _png(drawn, [(0, 0, 0, 0), (*COLOURS[side], 255)])))
    drawn = atlas(shown.determinant, lambda cut: _volume_change(cut, tile))
    found.append((_file("jacobian"), _png(drawn, [(*FOLD, 255), *((*rgb, 255) for rgb in colours(CHANGE, 255))])))
    if shown.error is not None:
        drawn = atlas(shown.error, lambda cut: _error(cut, tile))
        found.append((_file("uncertainty"), _png(drawn, [(*rgb, 255) for rgb in colours(ERROR, 256)])))
    back = np.linalg.inv(affine) @ np.linalg.inv(shown.alignment)
    lines = _together([_grid(plane, shown, at, affine, back, fine) for at in plane.slices], columns)
    found.append((_file("grid"), _png(lines // 64, [(*GRID_COLOUR, 85 * level) for level in range(4)])))
    return found


# --------------------------------------------------------------------------------- one slice, (H, W)


def _grey(cut: np.ndarray, tile: list[int]) -> np.ndarray:
    levels = (255 * np.clip(np.nan_to_num(cut), 0, 1)).round().astype(np.uint8)
    return np.asarray(Picture.fromarray(levels).resize((tile[0], tile[1]), Picture.Resampling.BOX))


def _cells(cut: np.ndarray, size: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of a slice at which each row and column of ``size`` pixels begins."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(size[::-1], cut.shape, strict=True))
    return rows, columns


def _outline(cut: np.ndarray, fine: list[int], *, dashed: bool) -> np.ndarray:
    """1 along the edges between the label's voxels, a pixel wide."""
    rows, columns = _cells(cut, fine)
    label = cut[np.ix_(rows, columns)]
    edge = np.zeros(label.shape, bool)
    edge[:-1] |= label[:-1] != label[1:]
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    if dashed:
        edge &= np.add.outer(*map(np.arange, edge.shape)) // 4 % 3 < 2
    return edge.astype(np.uint8)


def _volume_change(cut: np.ndarray, tile: list[int]) -> np.ndarray:
    """0 where anything in the pixel is folded, else 1 (det 0) to 255 (``LARGEST`` and more)."""
    rows, columns = _cells(cut, tile)
    least = np.minimum.reduceat(np.minimum.reduceat(cut, rows, axis=0), columns, axis=1)
    level = 1 + 254 * np.clip(np.nan_to_num(cut[np.ix_(rows, columns)]) / LARGEST, 0, 1)
    return np.where(least > 0, level.round(), 0).astype(np.uint8)  # NaN is a fold


def _error(cut: np.ndarray, tile: list[int]) -> np.ndarray:
    """0 to 255 (``FARTHEST`` and more), the largest of each pixel."""
    rows, columns = _cells(cut, tile)
    largest = np.maximum.reduceat(np.maximum.reduceat(cut, rows, axis=0), columns, axis=1)
    return (255 * np.clip(np.nan_to_num(largest) / FARTHEST, 0, 1)).round().astype(np.uint8)


def colours(map_: str, count: int) -> list[tuple[int, ...]]:
    """So many of a map, from its lowest value to its highest."""
    known = np.array([list(bytes.fromhex(colour)) for colour in map_.split()])
    at = np.linspace(0, len(known) - 1, count)
    channels = (np.interp(at, np.arange(len(known)), channel) for channel in known.T)
    return [*map(tuple, np.stack([*channels], axis=1).round().astype(int).tolist())]


def stops(map_: str) -> list[str]:
    """Nine colours of a map, for a bar, as CSS writes them."""
    return [f"#{bytes(rgb).hex()}" for rgb in colours(map_, 9)]


def _grid(plane: Plane, shown: Shown, at: int, affine: np.ndarray, back: np.ndarray, fine: list[int]) -> np.ndarray:
    """The lines of the fixed grid, deformed by the registration without the alignment; intensity 0 to 255."""
    d = plane.cut(shown.displacement, at)  # (D, A, B)
    shape = np.array(d.shape[1:])
    mm = voxel_size(affine)[list(plane.axes)]
    apart = np.maximum(1, np.rint((shape * mm).min() / GRID_LINES / mm)).astype(int)
    picture = Picture.new("L", (2 * fine[0], 2 * fine[1]))
    pen = ImageDraw.Draw(picture)
    for i in range(2):
        along = np.unique(np.linspace(0, shape[1 - i] - 1, 96).round().astype(int))
        for start in range(apart[i] // 2, shape[i], apart[i]):
            index = np.empty((len(along), 2), int)
            index[:, i], index[:, 1 - i] = start, along
            voxel = np.full((len(along), len(d)), float(at))
            voxel[:, list(plane.axes)] = index
            carried = apply_affine(back, apply_affine(affine, voxel) + flipped(d[:, index[:, 0], index[:, 1]].T))
            share = (carried[:, list(plane.axes)] + 0.5) / shape
            share = share if plane.across is None else 1 - share
            pen.line([tuple(xy) for xy in share * 2 * fine], fill=255, width=2)
    return np.asarray(picture.reduce(2))


# ------------------------------------------------------------------------------- atlas, points, file


def _together(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    height, width = tiles[0].shape
    sheet = np.zeros((height * math.ceil(len(tiles) / columns), width * columns), np.uint8)
    for i, tile in enumerate(tiles):
        row, column = i // columns * height, i % columns * width
        sheet[row : row + height, column : column + width] = tile
    return sheet


def _rows(landmarks: Landmarks, to_voxel: np.ndarray) -> list[dict[str, Any]]:
    """A row per landmark: its places in voxels of the view's axes, its errors in mm."""
    places = [apply_affine(to_voxel, points).round(2).tolist() for points in landmarks[:3]]
    keys = (*IMAGES, "errors")
    return [dict(zip(keys, row, strict=True)) for row in zip(*places, landmarks.errors.round(3).tolist(), strict=True)]


def _webp(grey: np.ndarray) -> bytes:
    data = io.BytesIO()
    Picture.fromarray(grey).save(data, format="WEBP", quality=QUALITY, method=2)
    return data.getvalue()


def _png(levels: np.ndarray, colours: list[tuple[int, ...]]) -> bytes:
    """Indices (H, W) into RGBA colours."""
    picture, data = Picture.fromarray(levels, mode="P"), io.BytesIO()
    picture.putpalette([c for rgba in colours for c in rgba[:3]])
    bits = next(n for n in (1, 2, 4, 8) if len(colours) <= 1 << n)
    picture.save(data, format="PNG", bits=bits, compress_level=3, transparency=bytes(rgba[3] for rgba in colours))
    return data.getvalue()

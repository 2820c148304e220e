"""Reads transforms: the folder of a registered case, or a transform file that ITK or ANTs wrote.

A transform is named by what it does to an image. As a map of points it goes the other way: ``moving_to_fixed``
takes a point of the fixed image to its moving point, and by that pulls the moving image onto the fixed grid.
"""

from __future__ import annotations

import codecs
import functools
import io
import re
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.io import formats, itk_bridge
from regpipe.io.images import header, place
from regpipe.io.series import read_series
from regpipe.transforms import claims, foreign
from regpipe.transforms.displacement import WRITABLE, read_displacement
from regpipe.utils import limits
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json, sha256

CASE = "transform.json"
FORMAT = "regpipe transform 1"
HDF5 = (".h5", ".hdf5")
ITK = HDF5 + (".tfm", ".txt", ".mat")
SIDES = ("fixed", "moving")
FILES = dict.fromkeys(HDF5, "HDF5") | {".tfm": "Txt", ".txt": "Txt", ".mat": "Matlab"}  # ITK's names
SMALL = 1000  # numbers; longer lists are compressed


class Space(NamedTuple):
    """A grid of voxels in space."""

    shape: tuple[int, ...]
    affine: np.ndarray  # (D+1, D+1) float64, voxel index -> RAS mm
    stored: np.ndarray | None = None  # the same of the file's own voxels, where its axes are sheared

    @property
    def voxels(self) -> np.ndarray:
        """Affine (D+1, D+1) of the voxels that people count: the file's own."""
        return self.affine if self.stored is None else self.stored


class Move(NamedTuple):
    """Transform files, and the grids of both images; a transform file alone has no grids."""

    images: Path  # its map of points takes the target to the source, and so pulls the source's images
    points: Path  # its map of points takes the source to the target
    source: Space | None = None
    target: Space | None = None


def find(path: str | Path, to: str = "fixed") -> Move:
    """The files that carry images and points ``to`` the ``fixed`` or the ``moving`` image, checked by their hashes.

    ``path``: a case's folder, its ``transform.json``, or a transform file; that goes one way, which is called
    ``fixed``, and maps points as the file says: for most files from the fixed image to the moving one.

    Raises:
        InputError: missing, no case, damaged since it was written; the other way of a file.
    """
    path = Path(path)
    if to not in SIDES:
        raise InputError(f"--to {to}: choose fixed or moving")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give the folder of a registered case or a transform file")
    if path.is_dir():
        path = path / CASE
    if path.suffix.lower() == ".json":
        return _case(path, to)
    if to != "fixed":
        raise InputError(f"{path}: a transform file goes one way; give the folder of the case, or the other way's file")
    return Move(path, path)


def grid_of(reference: str | Path | None, target: Space | None, transform: Any) -> Space:
    """The grid of an image, or the ``target`` of a move, as the grid of what an ``itk.Transform`` pulls.

    Raises:
        InputError: neither; of another dimension than the transform.
    """
    dim = transform.GetInputSpaceDimension()
    if reference is not None:
        target = Space(*(place if dim == 3 else header)(reference, film=True))
    if target is None:
        raise InputError("a transform file does not say on which grid the result lies: give --reference IMAGE")
    if len(target.shape) != dim:
        raise InputError(f"{reference or 'the target image'}: is {len(target.shape)}-D, the transform is {dim}-D")
    return target


def _case(path: Path, to: str) -> Move:
    if not path.is_file():
        raise InputError(f"{path}: missing; give the folder of a registered case or a transform file")
    there, back = ("moving_to_fixed", "fixed_to_moving") if to == "fixed" else ("fixed_to_moving", "moving_to_fixed")
    try:
        content = parse_json(path.read_bytes())
        if content["format"] != FORMAT:
            raise InputError(f"{path}: is of format {str(content['format'])[:40]!r}, not {FORMAT!r}; update regpipe")
        spaces = {side: _space(content[side]) for side in SIDES}
        if "itk" not in content[there]:
            raise InputError(f"{path}: its case was written without the format itk; register again with it")
        files = {way: _checked(path.parent, content[way]) for way in (there, back)}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as cause:
        if isinstance(cause, InputError):
            raise
        raise InputError(f"{path}: damaged ({type(cause).__name__}: {str(cause)[:200]}); register again") from cause
    source = spaces["moving" if to == "fixed" else "fixed"]
    return Move(files[there], files[back], source, spaces[to])


def _space(content: dict[str, Any]) -> Space:
    shape = tuple(int(n) for n in content["shape"])
    affine, stored = (np.array(content.get(name, content["affine"]), np.float64) for name in ("affine", "stored"))
    if not affine.shape == stored.shape == (len(shape) + 1,) * 2:
        raise ValueError(f"affine of shape {affine.shape} for an image of shape {shape}")
    limits.require_room("its image", shape)
    return Space(shape, affine, stored)


def _checked(folder: Path, way: dict[str, Any]) -> Path:
    path = folder / Path(way["itk"]).name  # of this folder and no other
    if not path.is_file():
        raise InputError(f"{path}: missing; copy the whole folder of the case, or register again")
    if sha256([path]) != way["sha256"][way["itk"]]:
        raise InputError(f"{path}: is not the file that {CASE} knows: damaged or exchanged; register again")
    return path


def read_transform(path: str | Path, *, points: bool = False) -> Any:
    """A transform file as ``itk.Transform``, LPS mm, that pulls images onto the target's grid.

    Read are ITK's .h5 .tfm .txt .mat, a displacement (NIfTI of intent 1007; vectors of a MetaImage or NRRD), and what
    ``transforms.foreign`` knows.
    ``points``: the map of points that the file says; of FreeSurfer's and MINC's affines that is the other way.

    Raises:
        InputError: missing, broken, several transforms without an order, an unknown suffix.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if name.endswith(WRITABLE):
        return itk_bridge.itk_field(*read_displacement(path))
    try:
        limits.require_size(path)
        other = foreign.read(path)
        if other is not None:
            return other.points if points else other.images
        if name.endswith(formats.ITK):
            return _field_of(path)
        if not name.endswith(ITK):
            known = dict.fromkeys((*ITK, *WRITABLE, *formats.ITK, *foreign.SUFFIXES))
            raise InputError(f"{path}: no transform file; use one of {' '.join(known)}")
        claims.check(path)  # opens HDF5, too: of a broken one ITK prints a page before it raises
        transforms = _as_itk(path)
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as cause:
        reason = str(cause).strip().splitlines()[-1].strip()[-120:]
        raise InputError(f"{path}: not a readable transform ({reason}); export it again") from cause
    if len(transforms) != 1:
        raise InputError(f"{path}: holds {len(transforms)} transforms; save one, or one composite")
    return transforms[0]


def _field_of(path: Path) -> Any:
    """A displacement as elastix and others write it: as many values at each place as there are axes, LPS mm."""
    found = read_series(path)
    if found is None or found.array.shape[-1] != len(found.affine) - 1 or found.plane is not None:
        raise InputError(f"{path}: no displacement, which has a vector at each place; give a transform file")
    return itk_bridge.itk_field(np.moveaxis(found.array, -1, 0), found.affine)


def _as_itk(path: Path) -> Any:
    """What ITK reads; a transform by the name of its base class, which it cannot make, as the affine that it is."""
    data = path.read_bytes()
    text = path.suffix.lower() in (".txt", ".tfm")
    if text and not re.search(rb"^Transform:", data.removeprefix(codecs.BOM_UTF8), re.MULTILINE):
        first = next(iter(data[:60].decode("utf-8", "replace").split("\n")), "").strip()
        raise InputError(f"{path}: neither ITK's nor a matrix that is known, it begins {first!r}; write ITK's .tfm")
    if claims.BASE.encode() not in data and not data.startswith(codecs.BOM_UTF8):
        return _read(path)
    data = data.removeprefix(codecs.BOM_UTF8)
    with tempfile.TemporaryDirectory() as aside:
        named = Path(aside) / path.name
        if path.suffix.lower() in HDF5:
            named.write_bytes(data)
            _rename_h5(named)
        else:
            named.write_bytes(re.sub(rf"{claims.BASE}(\w*)".encode(), _padded, data))
        return _read(named)


def _read(path: Path) -> list[Any]:
    """``itk.transformread``, which loads half of ITK before it reads: 8 seconds."""
    _register(FILES[path.suffix.lower()])
    reader = itk_bridge.wrapped("TransformFileReaderTemplate", "D", module="TransformFileReader").New()
    reader.SetFileName(str(path))
    reader.Update()
    held, transforms = reader.GetModifiableTransformList(), []
    while not held.empty():
        transforms.append(as_its_class(held.pop()))
    return transforms[::-1]


@functools.cache
def _register(kind: str) -> None:
    itk_bridge.wrapped(f"{kind}TransformIOFactory", "", module=f"{kind}TransformIO").RegisterOneFactory()


def as_its_class(transform: Any) -> Any:
    """A transform that ITK gave as one of its base class."""
    name, dim = transform.GetNameOfClass(), transform.GetInputSpaceDimension()
    if name in ("AffineTransform", "CompositeTransform", "DisplacementFieldTransform"):
        return itk_bridge.wrapped(name, f"D{dim}").cast(transform)
    import itk

    return itk.down_cast(transform)


def _padded(found: re.Match[bytes]) -> bytes:
    """The name of as many bytes, for those that count them; of text the rest is blank."""
    name = b"AffineTransform" + found[1]
    return name.ljust(len(found[0]), b" " if found.string.startswith(b"#") else b"\0")


def _rename_h5(path: Path) -> None:
    import h5py

    with h5py.File(path, "r+") as file:
        for group in file["TransformGroup"].values():
            for name in [name for name in group if name.endswith("Type")]:
                kind = group[name].asstr()[()]
                del group[name]
                named = np.array([str(k).replace(claims.BASE, "AffineTransform") for k in np.atleast_1d(kind)], object)
                group.create_dataset(name, data=named, dtype=h5py.string_dtype("ascii"))


def composite_bytes(transform: Any) -> bytes:
    """An ``itk.CompositeTransform`` as the bytes of a .h5 file, the same for the same transform.

    ITK's own file stamps the time and the machine: what it says of the transform is copied out of it.
    """
    import h5py

    data = io.BytesIO()
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "composite.h5"
        _register(FILES[path.suffix])
        writer = itk_bridge.wrapped("TransformFileWriterTemplate", "D", module="TransformFileWriter").New()
        writer.SetFileName(str(path))
        writer.AddTransform(transform)
        writer.Update()
        with h5py.File(path) as stamped, h5py.File(data, "w") as plain:
            for i, part in stamped["TransformGroup"].items():
                for name, values in part.items():
                    packed = {"compression": "gzip", "shuffle": True} if values.size > SMALL else {}
                    about = {"data": values[()], "dtype": values.dtype, "track_times": False}
                    plain.create_dataset(f"TransformGroup/{i}/{name}", **about, **packed)
    return data.getvalue()

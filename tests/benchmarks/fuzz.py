"""Damaged and made-up files for the readers: each must give its result or one ``InputError`` line; no crash, no hang.

    python tests/benchmarks/fuzz.py --inputs 10000                       # of each kind
    python tests/benchmarks/fuzz.py --kinds vtk --first 4711 --inputs 1  # one of them again; it stays in build/fuzz

Input ``k`` of a kind is the same bytes always: a whole file, changed one to four times at random. A long run goes
on with ``--first``. The last input stays on disk, so that a crash of the interpreter itself leaves what caused it; a
hang ends the process after ``HANG`` seconds with the stack.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import gzip
import hashlib
import json
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import wholes
from pydicom import uid

from regpipe.data.pairs import list_pairs
from regpipe.engines import record
from regpipe.io import itk_bridge
from regpipe.io.images import load_grid, read_image
from regpipe.io.labels import read_label
from regpipe.io.landmarks import read_landmarks
from regpipe.io.points import read_points
from regpipe.networks.weights import read_state_dict
from regpipe.transforms.read import find, read_transform
from regpipe.utils.errors import InputError, printable

SLOW, HANG = 10.0, 60.0  # seconds for one input: of the processor, and by the clock
SHOWN = 3  # failures of a kind that are printed whole
TRIANGLE = "vertex 1 2 3\nvertex 4.5 -5 6e1\nvertex 7 8 9.25\n"
TRANSFORM = b"a transform"
NUMBERS = (b"0", b"-1", b"1e999", b"nan", b"9" * 5000, b"4294967296", b"99999999999", b"\x7f\xff\xff\xff", b"\xff" * 4)
SIGNS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b",",
    b'"',
    b"'",
    b" ",
    b"\t",
    b"/",
    b".",
    b"#3",
    b"../../a",
)
NESTS = (b"[" * 20000, b"{", b"}", b"]", b"null", b"true", b"\\ud800", b"x" * 300)
TAGS = (  # of DICOM: rows, bits, samples, frames, pixels, an end, a sequence
    b"\x28\x00\x10\x00US\x02\x00\xff\xff",
    b"\x28\x00\x00\x01US\x02\x00\x10\x00",
    b"\x28\x00\x02\x00US\x02\x00\x03\x00",
    b"\x28\x00\x08\x00IS\x06\x00999999",
    b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff",
    b"\xfe\xff\x0d\xe0\x00\x00\x00\x00",
    b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff",
)
ODD: tuple[bytes, ...] = NUMBERS + SIGNS + NESTS


class Kind(NamedTuple):
    """A format: the name that its file must have, whole files of it, words that mean something in it, its reader."""

    file: str
    wholes: tuple[bytes, ...]
    words: tuple[bytes, ...]
    read: Callable[[Path], object]


def _move_origin(path: Path) -> None:
    """Read a transform and carry a point by it."""
    transform = read_transform(path)
    transform.TransformPoint([0.0] * transform.GetInputSpaceDimension())


def _list_all(path: Path) -> None:
    """A datalist, as a folder run and as training read it."""
    list_pairs(path, problems={})
    list_pairs(path, split="training")


def _move(path: Path) -> None:
    """Points in and out again."""
    file = read_points(path)
    file.render(file.points + 1)


def _read_both(path: Path) -> None:
    """As a label map and as an image; the last says what is refused."""
    try:
        read_label(path, landmark_channels=1)
    finally:
        read_image(path)


def kinds() -> dict[str, Kind]:
    """Every format by its name; paths in them are relative to the folder that ``prepare`` makes."""
    return {**_of_text(), **_of_transforms(), **_of_images()}


def _of_text() -> dict[str, Kind]:
    """Datalists, points, meshes; and what is kept beside a model or a case."""
    entries = [{"fixed_image": "set/a.nii", "moving_image": f"set/{name}.nii", "case": f"c{name}"} for name in "bc"]
    datalist = {"training": [{**entries[0], "fixed_landmarks": "p.csv"}], "validation": entries[1:]}
    place = {"label": "F", "position": [1, 2.5, -3], "positionStatus": "defined"}
    markups = {"markups": [{"type": "Fiducial", "coordinateSystem": "RAS", "controlPoints": [place]}]}
    fcsv = "# Markups fiducial file version = 4.10\n# CoordinateSystem = LPS\n# columns = id,x,y,z,label\na,1,2,3,t\n"
    table = b"\xef\xbb\xbfname,x,y,z\na,1,2.5,-3\nb,,,\n"
    facet = f"facet normal 0 0 1\nouter loop\n{TRIANGLE}endloop\nendfacet\n"
    facets = b"mesh".ljust(80) + (2).to_bytes(4, "little") + bytes(range(100))
    state = {"state_dict": {"module.conv.weight": torch.arange(6.0), "bias": torch.ones(2, 3, dtype=torch.float16)}}
    choices = {"pairing": "all", "holdout": 0.2, "seed": 0, "training_images": ["a.nii"]}
    choices |= record.Data._field_defaults | {"dataset_dir": None, "landmark_channels": None}
    trained = json.dumps(choices).encode()
    way = {"itk": "t.h5", "sha256": {"t.h5": hashlib.sha256(TRANSFORM).hexdigest()}}
    side = {"shape": [4, 5], "affine": np.eye(3).tolist()}
    case = {"format": "regpipe transform 1", "moving_to_fixed": way, "fixed_to_moving": way}
    case |= {"fixed": side, "moving": side}
    return {
        "datalist": Kind("list.json", (json.dumps(datalist).encode(),), (b"test", b"moving_mask", b"p.csv"), _list_all),
        "groups": Kind(
            "set/groups.csv", (b"case,group\na,1\nb,2\nc,3\nd,4\ne,4\nf,4\n",), (b"case", b"group"), _list_groups
        ),
        "landmarks": Kind("m.csv", (table, b"x,y\n1,2\n3,4\n"), (b"x", b"y", b"z"), read_landmarks),
        "points": Kind("q.csv", (table, b"x,y\n1,2\n3,4\n"), (b"x", b"y", b"z"), _move),
        "fcsv": Kind("q.fcsv", (fcsv.encode(),), (b"# ", b"RAS", b"columns = ", b"x,y,z"), _move),
        "markups": Kind("q.mrk.json", (json.dumps(markups).encode(),), (b"ROI", b"LPS", b"position"), _move),
        "vtk": Kind(
            "q.vtk",
            (wholes.mesh_vtk(binary=True), wholes.mesh_vtk(binary=False)),
            (b"POINTS ", b"SPACE=", b"double"),
            _move,
        ),
        "stl": Kind(
            "q.stl", (f"solid\n{facet}{facet}endsolid\n".encode(), facets), (b"vertex ", b"facet normal "), _move
        ),
        "weights": Kind(
            "w.pt",
            (wholes.saved(state, new=True), wholes.saved(state, new=False)),
            (b"ctorch\n", b"."),
            read_state_dict,
        ),
        "record": Kind("models/training.json", (trained,), (b"affine",), lambda path: record.read(str(path.parent))),
        "grid": Kind("grid.json", (b'{"shape": [64, 64], "spacing": [1.0, 2]}',), (b"[]",), load_grid),
        "case": Kind("transform.json", (json.dumps(case).encode(),), (b"shape", b"affine"), find),
    }


def _of_transforms() -> dict[str, Kind]:
    affine, field = itk_bridge.affine_part(wholes.PLACE), itk_bridge.field_part(np.ones((3, 4, 3, 2)), wholes.PLACE)
    composites = (
        itk_bridge.composite_h5(affine, field),
        wholes.hdf5_transforms(wholes.WHOLE, wholes.FIELD),
        wholes.hdf5_transforms(wholes.EULER),
    )
    texts = tuple(
        wholes.text_transforms(*parts)
        for parts in ((wholes.EULER,), (wholes.WHOLE, wholes.FIELD, wholes.SPLINE), (wholes.SPLINE,))
    )
    mats = (itk_bridge.affine_mat(wholes.PLACE), itk_bridge.affine_mat(np.eye(3)))
    return {
        "h5": Kind("t2.h5", composites, (b"TransformType", b"_float_3_3", b"TREE", b"SNOD", b"OHDR"), _move_origin),
        "tfm": Kind("t.tfm", texts, (b"Transform: ", b"_float_3_3", b"FixedParameters:", b"\n#"), _move_origin),
        "mat": Kind("t.mat", mats, (b"Euler3DTransform_double_3_3", b"_float_", b"fixed\x00"), _move_origin),
    }


def _of_images() -> dict[str, Kind]:
    volumes = (wholes.nifti((4, 5, 6), "u1"), wholes.nifti((4, 5), "f4"), wholes.nifti((3, 4, 2, 1), "i2"))
    head = b"ObjectType = Image\nNDims = 2\nDimSize = 9 10\nElementType = MET_UCHAR\nElementSpacing = 1 2\n"
    mha = head + b"ElementDataFile = LOCAL\n" + bytes(i % 7 for i in range(90))
    pair = volumes[1][:108] + bytes(4) + volumes[1][112:344] + b"ni1\0" + bytes(4)  # voxels from byte 0 on
    grey, ascii_ = bytes(i % 7 for i in range(90)), " ".join(str(i % 7) for i in range(90)).encode()
    nrrds = (wholes.nrrd("raw", grey), wholes.nrrd("ascii", ascii_), wholes.nrrd("gzip", gzip.compress(grey, mtime=0)))
    detached = wholes.nrrd("raw", b"").replace(b"encoding", b"data file: voxels.raw\nencoding")
    apart = head + b"ElementDataFile = voxels.raw\n"
    slices = tuple(wholes.dicom(0, syntax) for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian))
    slices += (wholes.dicom(0, uid.JPEGBaseline8Bit),)
    return {
        "nifti": Kind("v.nii", volumes, (b"n+1\x00", b"\x00\x00\x80\x3f"), _read_both),
        "nifti.gz": Kind("v.nii.gz", (gzip.compress(volumes[0], mtime=0),), (b"\x1f\x8b\x08",), _read_both),
        "nifti pair": Kind("h.hdr", (pair,), (b"ni1\x00", b"\x00\x00\x80\x3f"), _read_both),
        "nrrd": Kind("v.nrrd", nrrds, (b"sizes: ", b"type: double\n", b"raw", b"data file: ", b"kinds: "), _read_both),
        "nhdr": Kind("v.nhdr", (detached,), (b"LIST\n", b"voxels.raw", b"v%d.raw 1 2 1", b"skip: -1\n"), _read_both),
        "mhd": Kind("v.mhd", (apart,), (b"LIST\n", b"voxels.raw", b"HeaderSize = -1\n", b"%d.raw 1 2 1"), _read_both),
        "dicom": Kind("v.dcm", slices, TAGS, _read_both),
        "series": Kind("series/b.dcm", (wholes.dicom(3),), TAGS, _read_folder),
        "metaimage": Kind("v.mha", (mha,), (b"DimSize = ", b"MET_FLOAT", b"LOCAL", b"TransformMatrix = "), _read_both),
        "png": Kind("v.png", (wholes.picture("png"),), (b"IDAT", b"IHDR"), _read_both),
        "tiff": Kind("v.tif", (wholes.picture("tiff"),), (b"\x01\x01\x03\x00",), _read_both),
    }


def _list_groups(path: Path) -> None:
    list_pairs(path.parent, split="training")


def _read_folder(path: Path) -> None:
    """A slice among sound ones: the whole series."""
    read_image(path.parent)


def prepare(folder: Path) -> Path:
    """The files that the whole ones name: images, landmarks, a transform of which only the hash is looked at."""
    for name in ("models", "set", "series"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, place in (("a", 0), ("c", 6)):
        (folder / "series" / f"{name}.dcm").write_bytes(wholes.dicom(place))
    (folder / "h.img").write_bytes(wholes.nifti((4, 5), "f4")[352:])
    (folder / "voxels.raw").write_bytes(bytes(i % 7 for i in range(90)))
    (folder / "t.h5").write_bytes(TRANSFORM)
    for name in "abcdef":
        (folder / "set" / f"{name}.nii").write_bytes(wholes.nifti((4, 5), "u1"))
    (folder / "p.csv").write_text("x,y\n1,2\n")
    return folder


def made(name: str, kind: Kind, k: int) -> bytes:
    """Input ``k`` of a kind."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), k])
    data = kind.wholes[int(rng.integers(len(kind.wholes)))]
    for _ in range(rng.integers(1, 5)):
        data = _changed(data, kind, rng)
    return data


def _changed(data: bytes, kind: Kind, rng: np.random.Generator) -> bytes:
    """One change: bytes of other values, a piece lost, doubled or exchanged, a word put in, the end cut off."""
    low, high = sorted(int(i) for i in rng.integers(0, len(data) + 1, 2))
    near = min(low + int(rng.integers(0, 9)), len(data))
    words = (*ODD, *kind.words)
    word = words[int(rng.integers(len(words)))]
    noise = rng.bytes(int(rng.integers(1, 9)))
    changes = (
        lambda: data[:low] + noise + data[low + len(noise) :],
        lambda: (
            data[:low] + bytes([(data[low] if low < len(data) else 0) ^ (1 << int(rng.integers(8)))]) + data[low + 1 :]
        ),
        lambda: data[:low] + data[near:],
        lambda: data[:low] + data[high:],
        lambda: data[:high] + data[low:high] + data[high:],
        lambda: data[:low] + word + data[low:],
        lambda: data[:low] + word + data[near:],
        lambda: data[:low],
    )
    return changes[int(rng.integers(len(changes)))]()


def attempt(kind: Kind, path: Path, data: bytes) -> str:
    """``read`` or ``refused``; else what went wrong: the exception, a line that does not name the file, too slow."""
    path.write_bytes(data)
    begin = time.process_time()
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        kind.read(path)
        outcome = "read"
    except InputError as refusal:
        line = str(refusal)
        outcome = (
            "refused"
            if any(name in line for name in (path.name, str(path.parent), "holdout="))
            else f"nameless: {line}"
        )
        outcome = outcome if line == printable(line) and len(line) < 1000 else f"not one line: {line!r}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - begin
    return outcome if seconds < SLOW else f"slow: {seconds:.1f} s"


def fuzz(
    name: str, kind: Kind, folder: Path, first: int, inputs: int
) -> tuple[collections.Counter[str], dict[str, int]]:
    """Outcomes of so many inputs, counted; and for each that is wrong an input that gives it."""
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, int] = {}
    path = folder / kind.file
    for k in range(first, first + inputs):
        outcome = attempt(kind, path, made(name, kind, k))
        counts[outcome] += 1
        if outcome not in ("read", "refused"):
            examples.setdefault(outcome, k)
    return counts, examples


def main() -> None:
    known = kinds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", default=",".join(known), help="separated by commas")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import itk  # noqa: F401  it takes seconds, which are not the first input's

    folder, total, wrong = prepare(given.folder.resolve()), 0, 0
    for name in given.kinds.split(","):
        begin = time.monotonic()
        counts, examples = fuzz(name, known[name], folder, given.first, given.inputs)
        seconds = time.monotonic() - begin
        read, refused = counts.pop("read", 0), counts.pop("refused", 0)
        total, wrong = total + given.inputs, wrong + sum(counts.values())
        told = f"{read} read, {refused} refused, {sum(counts.values())} wrong"
        print(f"{name}: {given.inputs} inputs, {told}, {seconds:.0f} s")
        for outcome, count in counts.most_common():
            print(f"  {count} x {outcome}; for one: --kinds {name} --first {examples[outcome]} --inputs 1")
        sys.stdout.flush()
    print(f"{total} inputs from number {given.first} on, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

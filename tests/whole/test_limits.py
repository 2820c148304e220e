"""Files that claim more than they hold, unpack to more than there is, or point at other files: refused in a line."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import itk
import nibabel as nib
import numpy as np
import pytest
import torch

from helpers.folders import RNG, save
from regpipe.data.pairs import list_pairs
from regpipe.engines import checkpoints
from regpipe.io import images
from regpipe.io.points import read_points
from regpipe.networks.weights import read_state_dict
from regpipe.transforms import claims, read
from regpipe.transforms.displacement import read_displacement
from regpipe.transforms.read import find
from regpipe.utils import limits
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file
from regpipe.utils.machine import free

HUGE = (60000, 60000, 60000)
PLACED = "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n" + PLACED + "encoding: raw\nendian: little\n"
)
META = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"


def nifti2(shape: tuple[int, ...]) -> bytes:
    header = nib.Nifti2Header()
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+2\0\r\n\x1a\n", 544
    return header.binaryblock + b"\0" * 4


def extended(*sizes: int, zeros: int, order: str = "<") -> bytes:
    """A sound small NIfTI-1 with extensions that claim ``sizes``, the last one followed by zeros."""
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape((4, 4, 4))
    header["magic"], header["vox_offset"] = b"n+1\0", 352 + sum(sizes[:-1]) + zeros
    chain = b"".join(struct.pack(f"{order}ii", size, 6) + b"\0" * (size - 8) for size in sizes[:-1])
    last = struct.pack(f"{order}ii", sizes[-1], 6)
    return header.binaryblock + b"\1\0\0\0" + chain + last + b"\0" * (zeros - 8 + 4 * 4**3)


OVERSIZED: dict[str, bytes] = {
    "a.nii": nifti2(HUGE),
    "b.nii.gz": gzip.compress(nifti2(HUGE)),
    "c.nrrd": f"{NRRD}sizes: 60000 60000 60000\n\n1234".encode(),
    "d.mha": f"{META}DimSize = 60000 60000 60000\nElementDataFile = LOCAL\n1234".encode(),
    "e.nii.gz": gzip.compress(extended(32, 2**31 - 1, zeros=5000)),
    "f.nii.gz": gzip.compress(extended(20 << 20, zeros=20 << 20, order=">")),
}


@pytest.mark.parametrize("name", OVERSIZED)
def test_a_header_that_claims_too_much_is_refused_before_memory_is_given_for_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(OVERSIZED[name])
    assert itk.ImageIOFactory and free()  # what is loaded when it is first used does not count
    tracemalloc.start()
    with pytest.raises(
        InputError, match=f"{name}: .*(60000|header is said to have).*(export it again|mend its header)"
    ):
        images.read_image(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


def test_extensions_of_a_usual_length_are_read_over(tmp_path: Path) -> None:
    for order in "<>":
        (tmp_path / "a.nii").write_bytes(extended(16, 480, zeros=480, order=order))
        assert images.header(tmp_path / "a.nii")[0] == (4, 4, 4)


def test_zeros_packed_small_are_refused_where_they_do_not_fit_and_read_where_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.zeros((60, 60, 60), np.int16)
    array[0, 0, 0] = 1
    bomb = save(tmp_path / "a.nii.gz", array)
    assert array.nbytes > 200 * bomb.stat().st_size
    monkeypatch.setattr(limits, "UNASKED", 10**6)
    monkeypatch.setattr("regpipe.utils.machine.free", lambda: 8 * array.size - 1)
    with pytest.raises(InputError, match=r"a.nii.gz: says that it holds 60 x 60 x 60 values; that .* \(0.0016\d GiB"):
        images.read_image(bomb)
    monkeypatch.setattr("regpipe.utils.machine.free", lambda: 8 * array.size)
    assert images.read_image(bomb).array.sum() == 1


def test_a_sheared_grid_is_refused_for_what_it_becomes(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 2], affine[2, 2] = 9e6, 1e6  # the third axis leans on the first: 1e8 voxels of 1 mm to cover it
    path = save(tmp_path / "a.nii", np.zeros((8, 4096, 12), np.uint8), affine)
    with pytest.raises(InputError, match="a.nii: says that it holds .* x .* x .* does not fit into memory"):
        images.header(path)


def test_a_displacement_and_a_working_grid_are_not_believed_either(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000, 1, 3))
    header["magic"], header["vox_offset"], header["intent_code"] = b"n+1\0", 352, 1007
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 4))
    with pytest.raises(InputError, match="d.nii.gz: says that it holds 30000 x 30000 x 30000 x 1 x 3 values"):
        read_displacement(tmp_path / "d.nii.gz")
    (tmp_path / "working_grid.json").write_text(json.dumps({"shape": HUGE, "spacing": [1, 1, 1]}))
    with pytest.raises(InputError, match="working_grid.json: says that it holds 60000"):
        images.load_grid(tmp_path / "working_grid.json")


# ---------------------------------------------------------------------------------- other files


def test_a_case_takes_its_transforms_from_its_own_folder(tmp_path: Path) -> None:
    space = {"file": "f", "shape": [4, 4], "affine": np.eye(3).tolist(), "sha256": ""}
    way = {"itk": "../../other.h5", "sha256": {"../../other.h5": ""}}
    about = {"format": "regpipe transform 1", "fixed": space, "moving": space}
    about |= {"moving_to_fixed": way, "fixed_to_moving": way}
    replace_file(tmp_path / "case" / "transform.json", json.dumps(about).encode())
    with pytest.raises(InputError, match=r"case/other.h5: missing"):
        find(tmp_path / "case")
    about["fixed"] = {**space, "shape": HUGE, "affine": np.eye(4).tolist()}
    replace_file(tmp_path / "case" / "transform.json", json.dumps(about).encode())
    with pytest.raises(InputError, match="60000 x 60000 x 60000"):
        find(tmp_path / "case")


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "..", "a/b", "a\\b"])
def test_a_case_of_a_datalist_cannot_be_named_after_another_folder(tmp_path: Path, name: str) -> None:
    image = str(save(tmp_path / "a.nii", RNG.random((4, 4, 4))))
    entry = {"case": name, "fixed_image": image, "moving_image": image}
    (tmp_path / "list.json").write_text(json.dumps({"test": [entry]}))
    with pytest.raises(InputError, match="list.json: .* cannot name a case"):
        list_pairs(tmp_path / "list.json")


def test_files_larger_than_the_memory_are_not_read_whole(tmp_path: Path) -> None:
    for name, reads in (("a.json", list_pairs), ("b.stl", read_points), ("c.csv", read_points)):
        with (tmp_path / name).open("wb") as file:
            os.truncate(file.fileno(), 2**42)  # a hole: takes no room on the disk
        with pytest.raises(InputError, match=f"{name}: says that it holds 4398046511104 values"):
            reads(tmp_path / name)


# ------------------------------------------------------------------------------- transform files


def h5(path: Path, kind: str, count: int, fixed: list[float], **parameters: Any) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("TransformGroup/0")
        group.create_dataset("TransformType", data=np.array([kind], object), dtype=h5py.string_dtype("ascii"))
        group.create_dataset("TransformFixedParameters", data=np.array(fixed, float))
        group.create_dataset("TransformParameters", (count,), "f8", **parameters)
    return path


def text(path: Path, kind: str, count: int, fixed: list[float]) -> Path:
    numbers = (" ".join(["0"] * count), " ".join(map(str, fixed)))
    path.write_text(
        "#Insight Transform File V1.0\nTransform: {}\nParameters: {}\nFixedParameters: {}\n".format(kind, *numbers)
    )
    return path


def mat(path: Path, kind: str, count: int, fixed: list[float], *, claimed: int | None = None) -> Path:
    def array(name: str, rows: int, values: list[float]) -> bytes:
        head = struct.pack("<5i", 0, rows, 1, 0, len(name) + 1)
        return head + name.encode() + b"\0" + np.array(values, "<f8").tobytes()

    path.write_bytes(
        array(kind, count if claimed is None else claimed, [0.0] * count) + array("fixed", len(fixed), fixed)
    )
    return path


PLACE = [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
FIELDS = ("DisplacementFieldTransform_double_3_3", "BSplineTransform_double_3_3", "VelocityFieldTransform_double_3_3")


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("write, suffix", [(h5, ".h5"), (text, ".tfm"), (text, ".txt"), (mat, ".mat")])
def test_a_grid_larger_than_its_numbers_is_refused(
    tmp_path: Path, write: Callable[..., Path], suffix: str, kind: str
) -> None:
    sides = [2] if kind.startswith("Velocity") else []  # time is its fourth
    with pytest.raises(ValueError, match="60000 x 60000 x 60000.* and its 48 numbers do not fit"):
        claims.check(write(tmp_path / f"a{suffix}", kind, 48, [*HUGE, *sides, *PLACE]))
    claims.check(write(tmp_path / f"b{suffix}", kind, 48, [2, 2, 2, *sides, *PLACE]))
    claims.check(write(tmp_path / f"c{suffix}", "AffineTransform_double_3_3", 12, [1e6, 1e6, 1e6]))


def test_a_transform_that_claims_numbers_it_does_not_hold_is_refused(tmp_path: Path) -> None:
    chunked = h5(tmp_path / "a.h5", FIELDS[0], 10**12, [2, 2, 2, *PLACE], chunks=(2**18,))
    assert chunked.stat().st_size < 20_000
    with pytest.raises(InputError, match="a.h5: says that it holds 1000000000000 values"):
        claims.check(chunked)
    for claimed in (2**31 - 1, -12):
        with pytest.raises(ValueError, match=f"{claimed} x 1 numbers"):
            claims.check(mat(tmp_path / "a.mat", "AffineTransform_double_3_3", 12, [0, 0, 0], claimed=claimed))


@pytest.mark.parametrize("write, suffix", [(h5, ".h5"), (text, ".tfm"), (mat, ".mat")])
def test_a_transform_of_too_few_numbers_or_of_no_kind_is_refused_before_itk_reads_beyond_them(
    tmp_path: Path, write: Callable[..., Path], suffix: str
) -> None:
    path, kind = tmp_path / f"a{suffix}", "Euler3DTransform_double_3_3"
    assert read.read_transform(write(path, kind, 6, [0, 0, 0])).GetNumberOfParameters() == 6
    for broken, count, told in (
        (kind, 2, "holds 2 numbers for a Euler3D"),
        ("Euler3DTr_do", 6, "kind, 'Euler3DTr_do'"),
    ):
        with pytest.raises(InputError, match=f"a{suffix}: not a readable transform .*{told}"):
            read.read_transform(write(path, broken, count, [0, 0, 0]))


def test_hdf5_that_reads_from_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(96))
    external = h5(
        tmp_path / "a.h5", "AffineTransform_double_3_3", 12, [0, 0, 0], external=[(tmp_path / "secret", 0, 96)]
    )
    with pytest.raises(ValueError, match="TransformParameters refers to another file"):
        claims.check(external)
    for link in (h5py.ExternalLink("a.h5", "/TransformGroup"), h5py.SoftLink("/elsewhere")):
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["TransformGroup"] = link
        with pytest.raises(ValueError, match="TransformGroup refers to another place"):
            claims.check(tmp_path / "b.h5")


# --------------------------------------------------------------------------------------- weights


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("new", [True, False])
def test_weights_that_would_run_code_do_not(tmp_path: Path, new: bool) -> None:
    mark = tmp_path / "mark"
    torch.save({"a": torch.zeros(2), "b": Hostile(mark)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match="a.pt: not a readable weight file .*something other than tensors"):
        read_state_dict(tmp_path / "a.pt")
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the file would
    assert mark.exists()


def test_weights_that_unpack_or_expand_to_more_than_they_store_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10**5)}, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    assert (tmp_path / "packed.pt").stat().st_size < 10_000
    assert torch.load(tmp_path / "packed.pt", weights_only=True)["a"].numel() == 10**5  # torch would unpack it
    torch.save({"a": torch.zeros(1).expand(10**6, 3, 10**6)}, tmp_path / "wide.pt")
    torch.save({"a": torch.zeros(3, device="meta")}, tmp_path / "meta.pt")
    assert list(read_state_dict(tmp_path / "plain.pt")) == ["a"]
    for name, why in (("packed", "its parts are compressed"), ("wide", "more than they store"), ("meta", "more than")):
        with pytest.raises(InputError, match=f"{name}.pt: .*{why}"):
            read_state_dict(tmp_path / f"{name}.pt")
    (tmp_path / "packed.pt").rename(tmp_path / "checkpoint_1.pt")
    with pytest.raises(InputError, match="checkpoint_1.pt: damaged .its parts are compressed"):
        checkpoints.newest(tmp_path)

"""Truth: one set of places, written out in each format and order by hand; nibabel's affine for voxels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from regpipe.io.landmarks import named_landmarks, pairing, read_landmarks
from regpipe.io.points import read_points, write_points
from regpipe.io.source import Source
from regpipe.utils.errors import InputError

LPS = np.array([[10.5, -20.25, 30.0], [1.0, 2.0, -3.0], [7.0, 0.5, 4.0], [-6.0, 5.0, 2.5]])  # mm
RAS = LPS * [-1, -1, 1]
NAMES = ["nasion", "inion", "left, ear", "tip"]
OBLIQUE = np.array([[1.2, 0.3, 0, -20], [-0.4, 0.9, 0.2, 5], [0, -0.1, 2.5, -8], [0, 0, 0, 1]])


def table(header: str, points: np.ndarray, between: str = ",") -> str:
    rows = [[f'"{name}"', *map(repr, point)] for name, point in zip(NAMES, points.tolist(), strict=True)]
    return "\n".join([header, *(between.join(row) for row in rows)]) + "\n"


def markups(system: str, points: np.ndarray) -> str:
    controls = [
        {"id": f"{i}", "label": n, "position": p} for i, (n, p) in enumerate(zip(NAMES, points.tolist(), strict=True))
    ]
    return json.dumps({"markups": [{"type": "Fiducial", "coordinateSystem": system, "controlPoints": controls}]})


def slicer(system: str, points: np.ndarray) -> str:
    rows = [f'n{i},{x},{y},{z},0,0,0,1,1,1,0,"{NAMES[i]}",,' for i, (x, y, z) in enumerate(points.tolist())]
    columns = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
    return (
        "\n".join(["# Markups fiducial file version = 4.11", f"# CoordinateSystem = {system}", columns, *rows]) + "\n"
    )


def tag(points: np.ndarray, volumes: int = 1) -> str:
    rows = [f' {x} {y} {z} 1.0 1 1 "{n}"' for n, (x, y, z) in zip(NAMES, points.tolist(), strict=True)]
    return f"MNI Tag Point File\nVolumes = {volumes};\n% made by hand\n\nPoints =\n" + "\n".join(rows) + ";\n"


FILES = {
    "xyz.csv": table("label,x,y,z", LPS),
    "unit.csv": table("Name,X (mm),Y (mm),Z (mm)", LPS),
    "brackets.csv": table("id,x[mm],y[mm],z[mm]", LPS),
    "under.csv": table("landmark,x_mm,y_mm,z_mm", LPS),
    "cm.csv": table("label,x_cm,y_cm,z_cm", LPS / 10),
    "micron.csv": table("label,x (um),y (um),z (um)", LPS * 1000),
    "ras.csv": table("label,r,a,s", RAS),
    "RAS.csv": table("label,R,A,S", RAS),
    "x_ras.csv": table("label,x_ras,y_ras,z_ras", RAS),
    "lps.csv": table("label,l,p,s", LPS),
    "semicolon.csv": table("label;x;y;z", LPS, ";"),
    "tab.csv": table("label\tx\ty\tz", LPS, "\t"),
    "a.fcsv": slicer("LPS", LPS),
    "b.fcsv": slicer("RAS", RAS),
    "a.mrk.json": markups("LPS", LPS),
    "b.mrk.json": markups("RAS", RAS),
    "a.tag": tag(RAS),
}


@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_places_and_names_and_takes_other_places(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    found = named_landmarks(path)
    np.testing.assert_allclose(found.points, LPS, atol=1e-12)
    assert found.names == tuple(NAMES)
    file = read_points(path)
    write_points(tmp_path / f"moved_{name}", file, file.points + [1, 2, 3])
    again = named_landmarks(tmp_path / f"moved_{name}")
    np.testing.assert_allclose(again.points, LPS + [1, 2, 3], atol=1e-5)
    assert again.names == tuple(NAMES)


@pytest.mark.parametrize("header", ["label,i,j,k", "label,x_vox,y_vox,z_vox", "label,x (px),y (px),z (px)"])
def test_voxels_lie_where_their_image_does(tmp_path: Path, header: str) -> None:
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((9, 8, 7)).astype(np.float32), OBLIQUE), tmp_path / "i.nii"
    )
    at = np.array([[0, 0, 0], [8, 7, 6], [1.5, 2, 3], [4, 4, 4]])
    (tmp_path / "p.csv").write_text(table(header, at))
    found = Source().landmarks(tmp_path / "p.csv", tmp_path / "i.nii")
    stored = nib.Nifti1Image.from_filename(tmp_path / "i.nii").affine
    np.testing.assert_allclose(found.points, apply_affine(stored, at) * [-1, -1, 1], atol=1e-5)  # sheared, too
    with pytest.raises(InputError, match="counts in voxels"):
        read_landmarks(tmp_path / "p.csv")


def test_columns_in_mm_are_taken_where_there_are_voxels_too(tmp_path: Path) -> None:
    both = np.c_[np.zeros((4, 3)), RAS]
    (tmp_path / "p.csv").write_text(table("id,x_vox,y_vox,z_vox,x_ras,y_ras,z_ras", both))
    np.testing.assert_array_equal(read_landmarks(tmp_path / "p.csv"), LPS)


def test_a_picture_s_points_need_no_third_coordinate(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.eye(9, dtype=np.float32), np.diag([-1, -1, 1, 1])), tmp_path / "i.nii")
    (tmp_path / "p.fcsv").write_text(slicer("LPS", LPS * [1, 1, 0]))
    np.testing.assert_array_equal(Source().landmarks(tmp_path / "p.fcsv", tmp_path / "i.nii").points, LPS[:, :2])


def csv(path: Path, names: Sequence[str], points: Sequence[float]) -> Path:
    path.write_text("label,x,y\n" + "".join(f"{n},{p},0\n" for n, p in zip(names, points, strict=True)))
    return path


def paired(folder: Path, fixed: Sequence[str], moving: Sequence[str]) -> list[tuple[float, float]] | None:
    """Row numbers of both that are one place."""
    paths = csv(folder / "f.csv", fixed, range(len(fixed))), csv(folder / "m.csv", moving, range(len(moving)))
    order = pairing(named_landmarks(paths[0]), named_landmarks(paths[1]), *paths)
    return None if order is None else list(zip(*(rows.tolist() for rows in order), strict=True))


def test_names_pair_in_any_order_and_those_without_partner_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert paired(tmp_path, "abc", "cab") == [(0, 1), (1, 2), (2, 0)] and not caplog.records
    assert paired(tmp_path, ["a", "1", "Tip"], ["tip ", "01", "A"]) == [(0, 2), (1, 1), (2, 0)]
    assert paired(tmp_path, "abc", "abc") is paired(tmp_path, "aaa", "bbb") is paired(tmp_path, ["", ""], "ab") is None
    assert paired(tmp_path, "abcd", "xca") == [(0, 2), (2, 1)]
    assert paired(tmp_path, ["20240101", "20240102"], ["20240102", "20240103"]) == [(1, 0)]
    assert f"f.csv: b, d: not in {tmp_path / 'm.csv'}; left out" in caplog.text and "m.csv: x: not in" in caplog.text


@pytest.mark.parametrize(
    ("fixed", "moving", "told"),
    [
        ("abc", "xyz", "m.csv: no name as in"),
        ("abc", "aab", "m.csv: has two landmarks called 'a'"),
        ("aab", "abc", "f.csv: has two"),
    ],
)
def test_names_that_cannot_pair_are_refused(tmp_path: Path, fixed: str, moving: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        paired(tmp_path, fixed, moving)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("two.tag", tag(RAS, 2), "2 volumes"),
        ("no.tag", "x y z", "MNI Tag Point File"),
        ("p.vtk", "", "no landmarks"),
        ("inf.csv", "x,y\ninf,1\n", "infinite"),
        ("other.csv", "u,v,w\n1,2,3\n", "r,a,s"),
    ],
)
def test_a_file_that_holds_none_is_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: .*{told}"):
        named_landmarks(tmp_path / name)


def test_names_that_only_some_have_pair_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.csv").write_text("label,x,y,z\nA,1,2,3\n,4,5,6\n,7,8,9\n")
    found = named_landmarks(tmp_path / "p.csv")
    assert found.names is None and len(found.points) == 3 and "not all of its landmarks have a name" in caplog.text


PLACES = np.array([[10, 20, 30.0], [-5, 7, 3], [1, 2, -4]])  # LPS mm
RAS_PLACES = PLACES * [-1, -1, 1]
HEADERS: list[tuple[str, np.ndarray]] = [
    *[(f"{before}x,{before}y,{before}z", PLACES) for before in ("pos_", "coord_", "lps_")],
    *[(f"x{after},y{after},z{after}", PLACES) for after in ("_coord", "mm", " (world)", "_millimeter", ".mm")],
    ("CenterX,CenterY,CenterZ", PLACES),
    ("x_inch,y_inch,z_inch", PLACES / 25.4),
    ("x_nm,y_nm,z_nm", PLACES * 1e6),
    ("X [mm; RAS],Y [mm; RAS],Z [mm; RAS]", RAS_PLACES),
    ("ras_x,ras_y,ras_z", RAS_PLACES),
    ("r,a,i", RAS_PLACES * [1, 1, -1]),  # once read as r,a of a picture
    ("l,a,s", PLACES * [1, -1, 1]),
    ("a,r,s", RAS_PLACES[:, [1, 0, 2]]),
    ("i,j,k,r,a,s", np.c_[np.ones((3, 3)), RAS_PLACES]),
]


@pytest.mark.parametrize(("columns", "table"), HEADERS, ids=[columns for columns, _ in HEADERS])
def test_columns_say_in_many_ways_what_they_count(tmp_path: Path, columns: str, table: np.ndarray) -> None:
    rows = "".join(",".join(f"{value:.12g}" for value in row) + "\n" for row in table)
    (tmp_path / "a.csv").write_text(f"{columns}\n{rows}")
    found = named_landmarks(tmp_path / "a.csv")
    assert not found.voxels
    np.testing.assert_allclose(found.points, PLACES, rtol=1e-9)


@pytest.mark.parametrize("column", ["landmark_id", "Landmark Label", "labels", "Point Name", "names"])
def test_a_column_of_names_may_be_called_by_several_words(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.csv").write_text(f"# of a phantom\n{column},x,y,z\na,1,2,3\nb,NA,NA,NA\n")
    found = named_landmarks(tmp_path / "a.csv")
    assert found.names == ("a", "b")
    np.testing.assert_array_equal(found.points, [[1, 2, 3], [np.nan] * 3])


def test_decimal_commas_and_notes_stay_where_points_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("# note\nname;x;y\na;1,5;-2,25\n", "utf-8")
    file = read_points(tmp_path / "a.csv")
    np.testing.assert_array_equal(file.points, [[1.5, -2.25]])
    assert file.render(file.points + 1).decode() == "# note\nname;x;y\na;2,500000;-1,250000\n"


def test_markups_in_other_units_are_in_mm_here_and_stay_in_theirs(tmp_path: Path) -> None:
    points = [{"label": name, "position": list(row / 10)} for name, row in zip("abc", PLACES, strict=True)]
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "cm", "controlPoints": points}
    (tmp_path / "a.mrk.json").write_text(json.dumps({"markups": [markup]}))
    file = read_points(tmp_path / "a.mrk.json")
    np.testing.assert_allclose(file.points, PLACES)
    written = json.loads(file.render(file.points + 10))["markups"][0]["controlPoints"]
    np.testing.assert_allclose([point["position"] for point in written], PLACES / 10 + 1)
    (tmp_path / "b.mrk.json").write_text(json.dumps({"markups": [markup | {"coordinateUnits": "parsec"}]}))
    with pytest.raises(InputError, match="counts in 'parsec'; save it in mm"):
        read_points(tmp_path / "b.mrk.json")

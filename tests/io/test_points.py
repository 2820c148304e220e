"""Truth: files written out here by hand; ITK reads the meshes back and counts their cells."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from regpipe.io.points import read_points, write_points
from regpipe.utils.errors import InputError

POINTS = np.array([[10.5, -20.25, 30.0], [1.0, 2.0, -3.0], [7.0, 0.5, 4.0], [-6.0, 5.0, 2.5]])  # LPS mm
RAS = POINTS * [-1, -1, 1]
TRIANGLES = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
SHIFT = np.array([0.25, -1.5, 2.0])

FCSV = """# Markups fiducial file version = {version}
# CoordinateSystem = {system}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
"""


def fcsv(path: Path, system: str, places: np.ndarray) -> Path:
    rows = [f'p{i},{x},{y},{z},0,0,0,1,1,1,0,"tip, left",,node' for i, (x, y, z) in enumerate(places.tolist())]
    path.write_text(FCSV.format(version="4.10", system=system) + "\n".join(rows) + "\n")
    return path


def markup(kind: str, system: str, places: np.ndarray) -> dict:
    points = [{"id": str(i), "label": f"F-{i}", "position": p, "locked": True} for i, p in enumerate(places.tolist())]
    return {"type": kind, "coordinateSystem": system, "controlPoints": points, "display": {"opacity": 0.5}}


def mrk(path: Path, *markups: dict) -> Path:
    path.write_text(json.dumps({"@schema": "markups-schema-v1.0.3.json#", "markups": list(markups)}))
    return path


def vtk(path: Path, *, binary: bool, title: str = "a mesh", places: np.ndarray = POINTS) -> Path:
    """Legacy polydata as VTK writes it, with cell scalars, point scalars and normals."""
    cells = np.c_[np.full(4, 3), TRIANGLES]
    if binary:
        blocks = [a.tobytes() for a in (places.astype(">f4"), cells.astype(">i4"), np.arange(4).astype(">i4"))]
    else:
        blocks = [" ".join(map(str, a.ravel().tolist())).encode() for a in (places, cells, np.arange(4))]
    head = f"# vtk DataFile Version 3.0\n{title}\n{'BINARY' if binary else 'ASCII'}\nDATASET POLYDATA\n"
    path.write_bytes(
        head.encode()
        + b"POINTS 4 float\n%b\nPOLYGONS 4 16\n%b\nCELL_DATA 4\nSCALARS region int 1\nLOOKUP_TABLE default\n%b\n"
        % tuple(blocks)
    )
    return path


def stl(path: Path, *, binary: bool, title: str = "a mesh", places: np.ndarray = POINTS) -> Path:
    corners = places[TRIANGLES]
    if binary:
        facets = b"".join(struct.pack("<12fH", 0, 0, 0, *c.ravel(), 7) for c in corners)
        path.write_bytes(title.encode().ljust(80) + struct.pack("<I", 4) + facets)
    else:
        facet = "facet normal 0 0 0\n  outer loop\n{}\n  endloop\nendfacet\n"
        text = "".join(facet.format("\n".join(f"    vertex {x} {y} {z}" for x, y, z in c)) for c in corners)
        path.write_text(f"solid {title}\n{text}endsolid {title}\n")
    return path


def moved_file(path: Path) -> Path:
    """The file with all its points shifted by ``SHIFT`` in LPS, beside it."""
    file = read_points(path)
    out = path.with_name("moved_" + path.name)
    write_points(out, file, file.points + SHIFT[: file.points.shape[1]])
    return out


@pytest.mark.parametrize(("system", "places"), [("LPS", POINTS), ("1", POINTS), ("RAS", RAS), ("0", RAS)])
def test_fcsv_means_the_same_place_in_either_system_and_keeps_its_own(
    tmp_path: Path, system: str, places: np.ndarray
) -> None:
    path = fcsv(tmp_path / "a.fcsv", system, places)
    np.testing.assert_allclose(read_points(path).points, POINTS)
    moved = moved_file(path)
    np.testing.assert_allclose(read_points(moved).points, POINTS + SHIFT, atol=1e-6)
    lines = moved.read_text().splitlines()
    assert lines[:3] == path.read_text().splitlines()[:3]
    row = next(csv.reader([lines[3]]))
    assert row[4:] == ["0", "0", "0", "1", "1", "1", "0", "tip, left", "", "node"]
    sign = -1 if system in ("RAS", "0") else 1
    assert float(row[1]) == sign * (POINTS[0, 0] + SHIFT[0])


def test_every_markup_of_a_file_moves_in_its_own_system_and_nothing_else_changes(tmp_path: Path) -> None:
    path = mrk(tmp_path / "a.mrk.json", markup("Fiducial", "LPS", POINTS), markup("Curve", "RAS", RAS))
    np.testing.assert_allclose(read_points(path).points, np.r_[POINTS, POINTS])
    before, after = json.loads(path.read_text()), json.loads(moved_file(path).read_text())
    for markups, places in zip(after["markups"], (POINTS + SHIFT, (POINTS + SHIFT) * [-1, -1, 1]), strict=True):
        np.testing.assert_allclose([p["position"] for p in markups["controlPoints"]], places, atol=1e-6)
    for content in (before, after):
        for point in [p for m in content["markups"] for p in m["controlPoints"]]:
            del point["position"]
    assert before == after


def test_a_control_point_without_a_place_stays_without(tmp_path: Path) -> None:
    points = markup("Fiducial", "LPS", POINTS)
    points["controlPoints"][1] |= {"positionStatus": "undefined", "position": []}
    path = mrk(tmp_path / "a.mrk.json", points)
    assert np.isnan(read_points(path).points).all(axis=1).tolist() == [False, True, False, False]
    assert json.loads(moved_file(path).read_text())["markups"][0]["controlPoints"][1]["position"] == []


def test_csv_keeps_other_columns_their_order_and_missing_points(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('name,Y ,X,note\n"a, b",2,1,left\nlost,,,\n')
    np.testing.assert_array_equal(read_points(path).points, [[1, 2], [np.nan, np.nan]])
    assert moved_file(path).read_text() == 'name,Y ,X,note\n"a, b",0.500000,1.250000,left\nlost,,,\n'


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("title", "places"), [("a mesh", POINTS), ("3D Slicer output. SPACE=RAS", RAS)])
def test_a_vtk_mesh_keeps_all_but_its_points_as_itk_sees_it(
    tmp_path: Path, binary: bool, title: str, places: np.ndarray
) -> None:
    import itk

    path = vtk(tmp_path / "a.vtk", binary=binary, title=title, places=places)
    np.testing.assert_allclose(read_points(path).points, POINTS)
    moved = moved_file(path)
    np.testing.assert_allclose(read_points(moved).points, POINTS + SHIFT, atol=1e-6)
    meshes = [itk.meshread(str(file)) for file in (path, moved)]
    shift = SHIFT * ([-1, -1, 1] if "RAS" in title else [1, 1, 1])
    for k in range(4):
        np.testing.assert_allclose(np.array(meshes[1].GetPoint(k)), places[k] + shift, atol=1e-5)
    cells = [itk.array_from_vector_container(mesh.GetCellsArray()) for mesh in meshes]
    np.testing.assert_array_equal(*cells)
    assert cells[0].reshape(4, 5)[:, 2:].tolist() == TRIANGLES.tolist()  # ITK: type, count, three ids
    tail = [file.read_bytes().partition(b"POLYGONS")[2] for file in (path, moved)]
    assert tail[0] == tail[1]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("title", "places"), [("a mesh", POINTS), ("Slicer SPACE=RAS", RAS)])
def test_an_stl_mesh_keeps_its_facets_and_gets_its_normals(
    tmp_path: Path, binary: bool, title: str, places: np.ndarray
) -> None:
    path = stl(tmp_path / "a.stl", binary=binary, title=title, places=places)
    np.testing.assert_allclose(read_points(path).points, POINTS[TRIANGLES].reshape(-1, 3))
    moved = moved_file(path)
    np.testing.assert_allclose(read_points(moved).points, (POINTS + SHIFT)[TRIANGLES].reshape(-1, 3), atol=1e-5)
    first = places[TRIANGLES[0]]
    normal = np.cross(first[1] - first[0], first[2] - first[0])  # a shift does not change it
    data = moved.read_bytes()
    found = struct.unpack("<3f", data[84:96]) if binary else data.split()[data.split().index(b"normal") + 1 :][:3]
    np.testing.assert_allclose(np.array(found, float), normal / np.linalg.norm(normal), atol=1e-5)
    if binary:
        assert data[:84] == path.read_bytes()[:84] and data[132:134] == b"\x07\x00"


def broken(folder: Path, kind: str) -> Path:
    path = folder / kind
    whole = {
        "truncated.vtk": lambda: vtk(path, binary=True),
        "truncated_text.vtk": lambda: vtk(path, binary=False),
        "truncated.stl": lambda: stl(path, binary=True),
        "truncated_text.stl": lambda: stl(path, binary=False),
        "truncated.mrk.json": lambda: mrk(path, markup("Fiducial", "LPS", POINTS)),
        "plane.mrk.json": lambda: mrk(path, markup("Plane", "LPS", POINTS)),
        "ijk.mrk.json": lambda: mrk(path, markup("Fiducial", "IJK", POINTS)),
        "nowhere.fcsv": lambda: fcsv(path, "", POINTS),
        "xml.vtk": lambda: path.write_text("<VTKFile/>"),
        "words.csv": lambda: path.write_text("x,y\n1,two\n"),
        "short.csv": lambda: path.write_text("name,x,y\n1,2\n"),
        "headless.csv": lambda: path.write_text("1,2,3\n"),
        "empty.csv": lambda: path.write_text(""),
        "mesh.ply": lambda: path.write_text("ply"),
        "missing.csv": lambda: None,
    }
    whole[kind]()
    if kind.startswith("truncated"):
        path.write_bytes(path.read_bytes()[: 100 if "vtk" in kind else -40])
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("truncated.vtk", "holds fewer"),
        ("truncated_text.vtk", "holds fewer"),
        ("truncated.stl", "whole"),
        ("truncated_text.stl", "whole"),
        ("truncated.mrk.json", "export it again"),
        ("plane.mrk.json", "Plane"),
        ("ijk.mrk.json", "IJK"),
        ("nowhere.fcsv", "CoordinateSystem = LPS"),
        ("xml.vtk", "legacy"),
        ("words.csv", "two"),
        ("short.csv", "fewer cells"),
        ("headless.csv", "header x,y"),
        ("empty.csv", "header x,y"),
        ("mesh.ply", ".stl"),
        ("missing.csv", "no such file"),
    ],
)
def test_a_broken_file_is_told_in_one_line_that_names_it(tmp_path: Path, kind: str, told: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(InputError) as error:
        read_points(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and told in message and "\n" not in message

"""Whatever is wrong with what a user gives: one line that names it and says what to do, and the rest is done.

The bad files are in ``helpers.badinput.FILES``, all of them in one folder with two good pairs; what else can be given
wrongly is in the tables here and in ``test_bad_bundles``. Nothing leaves a traceback, and nothing a result that is
none.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers import badinput
from helpers.badinput import FILES, GOOD, Told, is_one_line, put, regpipe
from helpers.bundles import Command, deforming_bundle, train
from regpipe.bundle.write import write_bundle
from regpipe.data.checks import check_pairs
from regpipe.data.pairs import list_pairs
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.utils.errors import InputError, printable

# --- a folder of bad files ---


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = badinput.write_folder(tmp_path_factory.mktemp("bad") / "data")
    for side in ("fixed", "moving"):
        put(root / f"{side}_images" / "occupied.nii", badinput.RAW)
    return root


@pytest.fixture(scope="module")
def done(bad_folder: Path) -> tuple[Told, Path]:
    """The folder registered; a file lies where a result shall."""
    out = bad_folder.parent / "out"
    put(out / "occupied", b"mine")
    return regpipe("register", bad_folder, "-o", out, "--bundle", "none", "--refine", 2, "--affine", "none"), out


PLACES = {name: (place, word) for name, (place, _, word) in FILES.items()}
PLACES |= {"occupied": ("out/*", "cannot be written")}


@pytest.mark.parametrize("name", PLACES, ids=printable)
def test_of_a_folder_each_bad_file_is_named_and_leaves_no_result(name: str, done: tuple[Told, Path]) -> None:
    told, out = done
    place, word = PLACES[name]
    line = told.result["failures"][printable(name)]
    if name.startswith("two files"):
        place = "moving_images/*."
    if name.startswith("fewer landmarks"):
        place = "moving_landmarks/*.csv"  # its partner's count does not fit
    is_one_line(line, printable(place.replace("*", name)), word)
    assert not (out / name).is_dir()


def test_of_a_folder_the_good_cases_are_done_and_nothing_else_is_left(done: tuple[Told, Path]) -> None:
    told, out = done
    assert told.status == 1 and len(told.result["failures"]) == len(PLACES) >= 60
    assert {path.name for path in out.iterdir()} == {*GOOD, "occupied", "metrics.csv"}
    assert {str(row["case"]) for row in read_rows(out / "metrics.csv")} == {*GOOD}
    assert all((out / name / "moving_to_fixed.h5").is_file() for name in GOOD)
    assert (out / "occupied").read_bytes() == b"mine"


def test_the_checks_before_training_say_the_same_of_each_case(done: tuple[Told, Path], bad_folder: Path) -> None:
    problems: dict[str, str] = {}
    cases = list_pairs(bad_folder, problems=problems)
    problems |= check_pairs(cases)
    failures = {k: v for k, v in done[0].result["failures"].items() if k != "occupied"}
    assert problems == failures
    assert not {*GOOD} & {*problems}


def test_training_refuses_the_folder_before_it_writes_anything(
    bad_folder: Path, tmp_path: Path, monai_bundle: Command
) -> None:
    bundle = write_bundle("resnet18", tmp_path / "bundle")
    before = sorted(bundle.rglob("*"))
    with pytest.raises(Exception) as caught:
        train(monai_bundle, bundle, bad_folder)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    assert error is not None
    is_one_line(str(error), str(bad_folder))
    assert sorted(bundle.rglob("*")) == before


# --- what is asked for ---


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deforming_bundle(tmp_path_factory.mktemp("model") / "bundle", Grid((32, 32), (1.0, 1.0)))


def of_options(cohort: Path, bundle: Path, root: Path) -> dict[str, tuple[list[object], str]]:
    """name -> command and what its line must have."""
    new, one = write_bundle("resnet18", root / "new"), cohort / "fixed_images" / "case_000.nii.gz"
    options: dict[str, tuple[list[object], str]] = {
        "steps": (["--bundle", "none", "--refine", 0], "at least one step"),
        "smoothness": (["--smoothness", 0], "--smoothness 0: give more than 0"),
        "infinite smoothness": (["--smoothness", "inf"], "--smoothness inf"),
        "similarity": (["--similarity", "corr"], "choose among auto, lncc, mind"),
        "memory": (["--memory-gib", "nan"], "--memory_gib nan: give more than 0"),
        "less memory than is held": (["--memory-gib", 0.0001], "--memory_gib 0.0001: this process holds "),
        "affine": (["--affine", "elastic"], "--affine elastic: choose among"),
        "formats": (["--formats", "itk,dcm"], "'dcm'; choose among itk"),
        "refinement": (["--finest", 2, "--bundle", bundle], "--finest: with a bundle needs --refine STEPS"),
        "label": (["--fixed-label", one], "two files"),
        "no bundle": (["--bundle", root / "none"], "none/configs/inference.yaml"),
        "untrained": (["--bundle", new], "new/models/model.pt: no trained model"),
    }
    register = {
        name: (["register", cohort, *words, "-o", root / "out"], said) for name, (words, said) in options.items()
    }
    register["output"] = (["register", cohort, "-o", one], "case_000.nii.gz: cannot be made")
    register["no name for the output"] = (["register", cohort, "-o", ""], "-o: is followed by an empty word")
    return {**register, **of_places(cohort, root), **of_commands(bundle, one, root)}


def of_places(cohort: Path, root: Path) -> dict[str, tuple[list[object], str]]:
    """Of what is given to be registered."""
    images, link, empty, single = cohort / "fixed_images", root / "loop", root / "empty", root / "single"
    link.symlink_to(link)
    empty.mkdir()
    put(single / "one.nii", badinput.RAW)
    one = images / "case_000.nii.gz"
    places: dict[str, tuple[list[object], str]] = {
        "pairing": ([images, "--pairing", "last"], "'last' is not one of all"),
        "no folder": ([root / "nowhere"], "nowhere: no such folder"),
        "loop of links": ([link], "loop: no such folder"),
        "user of ~": (["~nobody at all/data"], "~nobody at all/data: no such folder"),
        "empty folder": ([empty], "empty: holds no image"),
        "one image": ([single], "one.nii: is the only image"),
        "one file": ([one], "case_000.nii.gz: is one image; give FIXED and MOVING"),
        "no file": ([one, root / "gone.nii"], "gone.nii: no such file"),
        "three files": ([one, one, one], "3 inputs: give one folder, or FIXED and MOVING"),
    }
    return {name: (["register", *words, "-o", root / "out"], said) for name, (words, said) in places.items()}


def of_commands(bundle: Path, one: Path, root: Path) -> dict[str, tuple[list[object], str]]:
    """Of other commands than ``register``."""
    out = root / "out"
    put(root / "a.nii", b"")
    return {
        "kind": (["phantom", root / "p", "--kind", "ct"], "ct"),
        "shape": (["phantom", root / "p", "--shape", "big"], "--shape"),
        "pairs": (["phantom", root / "p", "--pairs", 0], "0 pairs"),
        "occupied": (["phantom", bundle], "holds something else"),
        "unwritable": (["phantom", "/dev/null/p"], "/dev/null"),
        "set": (["compare", "-o", out, "--set", "max_epochs"], "--set wants ID=VALUE"),
        "unknown id": (["compare", "-o", out, "--set", "max_epoch=3"], "max_epoch"),
        "backbone": (["compare", "-o", out, "--backbones", "resnet"], "'resnet': choose one of resnet18"),
        "overlay": (["compare", "-o", out, "--overlay", root / "o.yaml"], "o.yaml"),
        "transform": (["apply", root / "gone.h5", one, "-o", out], "gone.h5: no such file"),
        "empty transform": (
            ["apply", root / "a.nii", one, "-o", out, "--reference", one],
            "a.nii: not a readable NIfTI",
        ),
    }


OPTIONS = [
    *(
        "steps",
        "smoothness",
        "infinite smoothness",
        "similarity",
        "memory",
        "less memory than is held",
        "no name for the output",
        "affine",
        "formats",
        "refinement",
        "label",
    ),
    *("no bundle", "untrained", "pairing", "output", "no folder", "loop of links", "user of ~", "empty folder"),
    *("one image", "one file", "no file", "three files", "kind", "shape", "pairs", "occupied", "unwritable", "set"),
    *("unknown id", "backbone", "overlay", "transform", "empty transform"),
]


@pytest.mark.parametrize("mistake", OPTIONS)
def test_a_mistake_ends_in_one_line_and_status_1(mistake: str, tmp_path: Path, cohort: Path, bundle: Path) -> None:
    table = of_options(cohort, bundle, tmp_path)
    assert {*table} == {*OPTIONS}
    arguments, said = table[mistake]
    told = regpipe(*arguments)
    assert told.status == 1 and len(told.lines) == 1 and told.lines[0] == told.error
    assert said in told.error, told.error
    assert not (tmp_path / "out").exists() and not (tmp_path / "p").exists()


# --- apply ---

THINGS: dict[str, tuple[bytes, str]] = {
    "cut.nii.gz": (badinput.PACKED[:800], "end-of-stream"),
    "damaged.nii.gz": (badinput.damaged(badinput.PACKED), "CRC check failed"),
    "volume.nii": (badinput.nifti(np.random.default_rng(0).random((5, 5, 5))), "is 3-D, the transform is 2-D"),
    "nan.nii": (badinput.nifti(badinput.ONES * np.float32(np.nan)), "NaN alone"),
    "words.csv": (b"x,y\none,two\n", "one"),
    "empty.csv": (b"", "header x,y"),
    "volume.csv": (b"x,y,z\n1,2,3\n3,4,5\n", "is 3-D, the transform is 2-D"),
    "nowhere.fcsv": (b"# columns = id,x,y,z\na,1,2,3\n", "CoordinateSystem = LPS"),
    "plane.mrk.json": (b'{"markups": [{"type": "Plane", "controlPoints": []}]}', "Plane"),
    "deep.mrk.json": (b"[" * 100_000, "nested too deeply"),
    "fewer.vtk": (b"# vtk DataFile Version 3.0\nm\nASCII\nPOINTS 4 float\n1 2 3\n", "holds fewer"),
    "endless.vtk": (b"# vtk DataFile Version 3.0\nm\nASCII\nPOINTS 9999999999 float\n1 2 3\n", "holds fewer"),
    "flat.stl": (b"solid\nfacet normal 0 0 1\nendfacet\nendsolid\n", "without three corners"),
    "cut.stl": (bytes(80) + b"\xff\xff\xff\xff", "neither a whole binary nor a whole text STL"),
    "mesh.ply": (b"ply", "unknown format"),
}


def test_of_many_files_carried_the_bad_ones_are_named_and_the_good_ones_are_there(
    done: tuple[Told, Path], bad_folder: Path, tmp_path: Path
) -> None:
    case, image, points = done[1] / GOOD[0], bad_folder / "moving_images" / "plain.nii", tmp_path / "points.csv"
    bad = [*(tmp_path / name for name in THINGS), tmp_path / "gone.nii"]
    for file in bad[:-1]:
        put(file, THINGS[file.name][0])
    put(points, b"x,y\n1,2\n")
    told = regpipe("apply", case, *bad, image, points, "-o", tmp_path / "out")
    assert told.status == 1 and [*told.result["problems"]] == [str(file) for file in bad]
    assert told.lines == [*told.result["problems"].values()]
    words = [*(word for _, word in THINGS.values()), "no such file"]
    for line, file, word in zip(told.lines, bad, words, strict=True):
        is_one_line(line, f"{file}: ", word)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plain.nii", "points.csv"}


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no case": (lambda case: (case / "transform.json").unlink(), "transform.json: missing"),
    "no JSON": (lambda case: put(case / "transform.json", b"{"), "transform.json: damaged"),
    "JSON nested too deeply": (lambda case: put(case / "transform.json", b"[" * 100_000), "transform.json: damaged"),
    "no transform": (lambda case: (case / "moving_to_fixed.h5").unlink(), "moving_to_fixed.h5: missing"),
    "another transform": (
        lambda case: shutil.copy(case / "fixed_to_moving.h5", case / "moving_to_fixed.h5"),
        "moving_to_fixed.h5: is not the file that transform.json knows",
    ),
    "half a transform": (
        lambda case: put(case / "moving_to_fixed.h5", b"\x89HDF\r\n\x1a\n"),
        "moving_to_fixed.h5: is not",
    ),
}


@pytest.mark.parametrize("damage", CASES)
def test_a_damaged_case_is_refused(damage: str, done: tuple[Told, Path], bad_folder: Path, tmp_path: Path) -> None:
    change, said = CASES[damage]
    change(shutil.copytree(done[1] / GOOD[0], tmp_path / "case"))
    told = regpipe("apply", tmp_path / "case", bad_folder / "moving_images" / "plain.nii", "-o", tmp_path / "out")
    assert told.status == 1 and len(told.lines) == 1 and not (tmp_path / "out").exists()
    is_one_line(told.error, said)

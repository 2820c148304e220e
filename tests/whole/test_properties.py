"""Theorems that hold whatever is put in: of the field algebra, of geometry, and of who is paired with whom.

Hypothesis looks for what breaks them, with the same examples every time (see ``conftest``).
"""

from __future__ import annotations

import csv
import itertools
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from regpipe.data.pairs import list_pairs
from regpipe.fields.algebra import compose, identity_grid, integrate_both, resize, warp
from regpipe.io.geometry import voxel_size
from regpipe.io.images import Grid, Image, to_grid
from regpipe.io.points import read_points, write_points
from regpipe.transforms.displacement import (
    grid_displacement,
    map_points,
    native_displacement,
    read_displacement,
    write_displacement,
)
from regpipe.utils.errors import InputError

SHAPES = st.one_of(st.tuples(st.integers(12, 32), st.integers(12, 32)), st.tuples(*[st.integers(12, 20)] * 3))
SMALL = st.one_of(st.tuples(*[st.integers(2, 9)] * 2), st.tuples(*[st.integers(2, 6)] * 3))
SEEDS = st.integers(0, 2**32 - 1)
Shape = tuple[int, ...]


def noise(shape: Shape, seed: int, amplitude: float) -> torch.Tensor:
    """A field (1, D, *shape) as rough as can be."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-amplitude, amplitude, (1, len(shape), *shape))).float()


def wave(shape: Shape, seed: int, amplitude: float) -> torch.Tensor:
    """A smooth field (1, D, *shape) of at most ``amplitude`` voxels, 0 at the rim: random half waves."""
    rng = np.random.default_rng(seed)
    unit = [torch.linspace(0, np.pi, n) for n in shape]
    field = torch.zeros(1, len(shape), *shape)
    for channel in range(len(shape)):
        waves = [torch.sin(int(rng.integers(1, 3)) * axis) for axis in unit]
        product = waves[0]
        for one in waves[1:]:
            product = product[..., None] * one
        field[0, channel] = rng.uniform(-1, 1) * amplitude * product
    return field


def linear(shape: Shape, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The displacement ``A x + b`` on a grid, and A and b."""
    rng = np.random.default_rng(seed)
    matrix, shift = rng.uniform(-0.1, 0.1, (len(shape),) * 2), rng.uniform(-1, 1, len(shape))
    at = np.moveaxis(identity_grid(shape)[0].numpy(), 0, -1)
    return torch.from_numpy(np.moveaxis(at @ matrix.T + shift, -1, 0)).float()[None], matrix, shift


# --- fields ---


@given(SHAPES, SEEDS, st.floats(0, 2))
def test_exp_of_v_and_of_minus_v_undo_each_other(shape: Shape, seed: int, amplitude: float) -> None:
    forward, backward = integrate_both(wave(shape, seed, amplitude))
    # linear interpolation errs by h^2 / 8 of the second derivative: amplitude (2 pi / (n - 1))^2 per axis, twice over
    bound = 2 * len(shape) * amplitude * (2 * np.pi / (min(shape) - 1)) ** 2 / 8 + 1e-4
    for there, back in ((forward, backward), (backward, forward)):
        assert compose(there, back).abs().max() <= bound


@given(SMALL, SEEDS, st.floats(0, 20))
def test_no_displacement_changes_nothing_on_either_side(shape: Shape, seed: int, amplitude: float) -> None:
    u = noise(shape, seed, amplitude)
    still = torch.zeros_like(u)
    torch.testing.assert_close(compose(u, still), u, rtol=0, atol=1e-5 * (1 + amplitude))
    assert torch.equal(compose(still, u), u)


@given(SHAPES, SEEDS, SEEDS, st.lists(st.integers(-2, 2), min_size=3, max_size=3))
def test_composing_whole_translations_is_associative_to_rounding(
    shape: Shape, first: int, second: int, steps: list[int]
) -> None:
    u, v = noise(shape, first, 1.5), noise(shape, second, 1.5)
    w = torch.zeros_like(u) + torch.tensor(steps[: len(shape)], dtype=torch.float32).view(1, -1, *[1] * len(shape))
    left, right = compose(compose(u, v), w), compose(u, compose(v, w))
    inner = (slice(None), slice(None), *[slice(2, -2)] * len(shape))  # beyond, the rim is repeated on one side first
    torch.testing.assert_close(left[inner], right[inner], rtol=0, atol=1e-4)


@given(SHAPES, SEEDS, SEEDS, SEEDS)
def test_composing_smooth_fields_is_associative_to_interpolation(shape: Shape, a: int, b: int, c: int) -> None:
    u, v, w = (wave(shape, seed, 1.0) for seed in (a, b, c))
    difference = compose(compose(u, v), w) - compose(u, compose(v, w))
    # one side interpolates a field that the other composes: as above, with amplitudes of 1
    assert difference.abs().max() <= 2 * len(shape) * (2 * np.pi / (min(shape) - 1)) ** 2 / 8 + 1e-4


@given(SMALL, SEEDS, st.floats(0, 1e4), st.floats(-1e6, 1e6, width=32))
def test_a_constant_image_stays_constant_under_any_field(
    shape: Shape, seed: int, amplitude: float, value: float
) -> None:
    image = torch.full((1, 1, *shape), value)
    warped = warp(image, noise(shape, seed, amplitude))
    torch.testing.assert_close(warped, image, rtol=1e-5, atol=0)
    assert torch.equal(warp(image, noise(shape, seed, amplitude), mode="nearest"), image)


@given(SMALL, SEEDS, st.integers(2, 4))
def test_a_field_on_a_grid_that_holds_its_own_comes_back(shape: Shape, seed: int, factor: int) -> None:
    u = noise(shape, seed, 3)
    finer = [factor * (n - 1) + 1 for n in shape]
    torch.testing.assert_close(resize(resize(u, finer), shape), u, rtol=0, atol=1e-4)


@given(SMALL, SMALL, SEEDS)
def test_resizing_keeps_a_linear_map(old: Shape, new: Shape, seed: int) -> None:
    assume(len(old) == len(new))
    u, matrix, shift = linear(old, seed)
    scale = (np.array(new) - 1) / (np.array(old) - 1)  # new voxels per old one
    at = np.moveaxis(identity_grid(new)[0].numpy(), 0, -1) / scale
    expected = np.moveaxis((at @ matrix.T + shift) * scale, -1, 0)
    np.testing.assert_allclose(resize(u, new)[0].numpy(), expected, atol=1e-4)


# --- geometry ---


@st.composite
def affines(draw: st.DrawFn, dim: int) -> np.ndarray:
    """Voxel -> RAS mm: axes in any order and direction, turned, of any size from 0.3 to 5 mm, anywhere."""
    angles = [draw(st.floats(-40, 40)) for _ in range(3)] if dim == 3 else [draw(st.floats(-40, 40)), 0, 0]
    turned = Rotation.from_euler("zyx", angles, degrees=True).as_matrix()[:dim, :dim]
    order = draw(st.permutations(range(dim)))
    sizes = [draw(st.floats(0.3, 5)) * draw(st.sampled_from((-1, 1))) for _ in range(dim)]
    affine = np.eye(dim + 1)
    affine[:dim, :dim] = (turned * sizes)[:, order]
    affine[:dim, dim] = [draw(st.floats(-300, 300)) for _ in range(dim)]
    return affine


@st.composite
def placed(draw: st.DrawFn) -> tuple[Shape, np.ndarray, np.ndarray]:
    """A shape and two affines of its dimension."""
    shape = draw(SMALL)
    return shape, draw(affines(len(shape))), draw(affines(len(shape)))


@given(st.tuples(*[st.integers(2, 9)] * 3), affines(3), st.permutations(range(3)), st.lists(st.booleans(), min_size=3))
def test_how_the_axes_are_stored_does_not_move_the_working_grid(
    shape: Shape, affine: np.ndarray, order: list[int], flips: list[bool]
) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    turns = [[k, -1 if flipped else 1] for k, flipped in zip(order, flips[:3], strict=True)]
    other = nib.orientations.apply_orientation(array, turns)
    moved = affine @ nib.orientations.inv_ornt_aff(turns, shape)
    cosines = np.abs(affine[:3, :3] / voxel_size(affine))
    assume(np.sort(cosines, axis=1)[:, -1].min() > np.sort(cosines, axis=1)[:, -2].max() + 0.01)  # a closest axis
    grid = Grid((8, 8, 8), (1.1, 1.2, 1.3))
    frames = to_grid(Image(array, affine), grid), to_grid(Image(other, moved), grid)
    np.testing.assert_allclose(*frames, atol=1e-6)


@given(placed(), SEEDS)
def test_a_displacement_goes_to_millimetres_and_back(case: tuple[Shape, np.ndarray, np.ndarray], seed: int) -> None:
    shape, fixed, moving = case
    u = noise(shape, seed, 2)[0].numpy()
    image = Image(np.zeros(shape, np.uint8), fixed)  # the fixed image's own grid is the working grid
    d = native_displacement(u, fixed, moving, image)
    np.testing.assert_allclose(grid_displacement(d, fixed, fixed, moving, shape), u, atol=2e-3)  # float32 mm, 0.3 mm


@given(placed(), SEEDS)
def test_a_displacement_survives_its_file_in_lps_millimetres(
    case: tuple[Shape, np.ndarray, np.ndarray], seed: int
) -> None:
    shape, affine, _ = case
    d = noise(shape, seed, 50)[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        write_displacement(Path(folder) / "d.nii.gz", d, affine)
        read, place = read_displacement(Path(folder) / "d.nii.gz")
    np.testing.assert_array_equal(read, d)
    np.testing.assert_allclose(place, affine, rtol=1e-6, atol=1e-4)


@given(placed(), SEEDS)
def test_points_through_a_linear_displacement_go_where_the_matrix_says(
    case: tuple[Shape, np.ndarray, np.ndarray], seed: int
) -> None:
    shape, affine, _ = case
    dim, rng = len(shape), np.random.default_rng(seed)
    flip = np.array([-1.0, -1.0, 1.0])[:dim]
    matrix, shift = rng.uniform(-0.2, 0.2, (dim, dim)), rng.uniform(-9, 9, dim)
    at = np.moveaxis(np.indices(shape), 0, -1)
    d = np.moveaxis(apply_affine(affine, at) * flip @ matrix.T + shift, -1, 0)
    points = apply_affine(affine, rng.uniform(0, 1, (20, dim)) * (np.array(shape) - 1)) * flip
    np.testing.assert_allclose(map_points(points, d, affine), points + points @ matrix.T + shift, atol=1e-6)


COORDINATES = st.lists(st.tuples(*[st.floats(-1e5, 1e5)] * 3), min_size=1, max_size=8)


@given(COORDINATES, st.sampled_from(("p.csv", "lps.fcsv", "ras.fcsv")))
def test_points_survive_their_file_whatever_it_counts_in(places: list[tuple[float, float, float]], name: str) -> None:
    heads = {"p.csv": "x,y,z\n"} | {
        f"{s}.fcsv": f"# CoordinateSystem = {s.upper()}\n# columns = x,y,z\n" for s in ("lps", "ras")
    }
    points = np.array(places)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(heads[name] + "0,0,0\n" * len(points))
        write_points(path, read_points(path), points)
        np.testing.assert_allclose(read_points(path).points, points, rtol=0, atol=5.1e-7)
        side = np.array([[float(x) for x in row] for row in csv.reader(path.read_text().splitlines()[-len(points) :])])
    np.testing.assert_allclose(side, points * ([-1, -1, 1] if name == "ras.fcsv" else 1), rtol=0, atol=5.1e-7)


# --- pairing ---

LETTERS = st.characters(categories=("L", "N", "P", "S", "Zs", "M"), exclude_characters="/")
NAMES = st.text(LETTERS, min_size=1, max_size=20).filter(lambda name: not name.startswith("."))
SUFFIX = st.sampled_from((".nii.gz", ".nii", ".png", ".mha", ".TIF"))


def listed(names: dict[str, str], folders: tuple[str, ...], groups: list[str] | None = None, **options: object) -> list:
    """The pairs of empty files of these stems and suffixes, each the same in all of the folders."""
    with tempfile.TemporaryDirectory() as root:
        for folder, (name, suffix) in itertools.product(folders, names.items()):
            (Path(root) / folder).mkdir(exist_ok=True)
            (Path(root) / folder / f"{name}{suffix}").touch()
        if groups is not None:
            with (Path(root) / "groups.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("case", "group"), *zip(names, groups, strict=True)])
        return list_pairs(root, **options)  # type: ignore[arg-type]


def sides(cases: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(Path(case["fixed_image"]).name, Path(case["moving_image"]).name) for case in cases]


@given(st.dictionaries(NAMES, SUFFIX, min_size=2, max_size=7))
def test_of_any_names_every_ordered_pair_is_listed_once(names: dict[str, str]) -> None:
    cases = listed(names, ("images",))
    files = [name + suffix for name, suffix in names.items()]
    assert sorted(sides(cases)) == sorted(itertools.permutations(files, 2))
    assert len({case["case"] for case in cases}) == len(cases)


def test_pairs_of_one_name_are_refused_for_one_would_be_lost() -> None:
    names = dict.fromkeys(("a", "b_to_c", "a_to_b", "c"), ".png")
    with pytest.raises(InputError, match="two pairs are named a_to_b_to_c; rename"):
        listed(names, ("images",))


@given(st.dictionaries(NAMES, SUFFIX, min_size=1, max_size=7))
def test_of_any_names_each_file_finds_its_partner(names: dict[str, str]) -> None:
    cases = listed(names, ("fixed_images", "moving_images"))
    assert sorted(sides(cases)) == sorted((name + suffix,) * 2 for name, suffix in names.items())
    assert sorted(case["case"] for case in cases) == sorted(names)


@given(st.dictionaries(NAMES, SUFFIX, min_size=4, max_size=9), st.integers(0, 99), st.integers(2, 4))
def test_no_subject_is_in_both_splits_and_none_is_lost(names: dict[str, str], seed: int, holdout: int) -> None:
    assume(holdout <= len(names) - 2)
    split = {s: listed(names, ("images",), split=s, seed=seed, holdout=holdout) for s in ("training", "validation")}
    there, held = ({name for pair in sides(cases) for name in pair} for cases in split.values())
    assert not there & held and there | held == {name + suffix for name, suffix in names.items()}
    assert len(held) == holdout


@given(st.dictionaries(NAMES, SUFFIX, min_size=6, max_size=9), st.data(), st.integers(0, 99))
def test_no_group_is_in_both_splits(names: dict[str, str], data: st.DataObject, seed: int) -> None:
    groups = [data.draw(st.sampled_from("abcd")) for _ in names]
    assume(len({*groups}) >= 2)
    folders = ("fixed_images", "moving_images")
    split = [listed(names, folders, groups, split=s, seed=seed, holdout=1) for s in ("training", "validation")]
    of = dict(zip(names, groups, strict=True))
    there, held = ({of[case["case"]] for case in cases} for cases in split)
    assert not there & held and len(held) == 1 and sum(map(len, split)) == len(names)

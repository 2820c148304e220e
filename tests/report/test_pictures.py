"""The pictures show what they claim: orientation, bent lines, squares, colours, folds."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from regpipe.metrics.measures import determinant_of
from regpipe.report import pictures

SIZE, SCALE = 64, 4  # 64 voxels on 256 pixels


def draw(u: np.ndarray, fixed: np.ndarray | None = None, **options) -> dict[str, np.ndarray]:
    """Pictures of black images, or of ``fixed`` thrice, with the displacement ``u``."""
    image = np.zeros(u.shape[1:]) if fixed is None else fixed
    return pictures.pictures(image, image, image, u, **options)


def still(*shape: int) -> np.ndarray:
    return np.zeros((len(shape), *shape), np.float32)


def random_pair(*shape: int) -> list[np.ndarray]:
    """Fixed, moving and warped noise, and a displacement of noise."""
    rng = np.random.default_rng(0)
    return [*rng.random((3, *shape)), rng.standard_normal((len(shape), *shape))]


def columns_of_lines(grid: np.ndarray) -> np.ndarray:
    """Centres (pixels) of the vertical lines; the median over rows skips the horizontal ones."""
    row = np.median(grid.sum(-1), axis=0)
    lit = np.flatnonzero(row)
    runs = np.split(lit, np.flatnonzero(np.diff(lit) > 1) + 1)
    return np.array([np.average(run, weights=row[run]) for run in runs])


def is_red(picture: np.ndarray) -> np.ndarray:
    return (picture == (255, 0, 0)).all(-1)


def test_every_title_has_its_picture_and_all_are_rgb_bytes():
    result = pictures.pictures(*random_pair(48, 40))
    assert list(result) == list(pictures.PICTURES)
    for picture in result.values():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 256


def test_the_inputs_are_left_alone_and_the_same_inputs_give_the_same_pictures():
    inputs = random_pair(32, 32)
    before = [a.copy() for a in inputs]
    first, second = pictures.pictures(*inputs), pictures.pictures(*inputs)
    assert all(np.array_equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_2d_picture_looks_as_in_an_image_viewer():
    seen = np.random.default_rng(0).integers(0, 256, (300, 400), np.uint8)  # rows, columns
    picture = draw(still(400, 300), seen.T / 255)["fixed"]  # array axis 0 is the column
    assert np.array_equal(picture[..., 0], seen)


def test_a_slice_of_a_volume_has_axis_0_to_the_right_and_axis_1_upwards():
    volume = np.zeros((SIZE, SIZE, 5))
    volume[40:, 40:, 2] = 1  # right and anterior, on the middle slice only
    picture = draw(still(SIZE, SIZE, 5), volume)["fixed"]
    assert picture[:80, 180:].min() > 240 and picture[110:].max() == 0
    flipped = draw(still(SIZE, SIZE, 5), volume, origin="upper")["fixed"]
    assert np.array_equal(flipped, picture[::-1])


@pytest.mark.parametrize("axis, shape", [(0, (12, 11)), (1, (12, 10)), (-1, (11, 10))])
def test_the_two_axes_that_are_not_cut_are_shown(axis, shape):
    picture = draw(still(10, 11, 12), axis=axis)["fixed"]
    assert picture.shape[0] * shape[1] == picture.shape[1] * shape[0]


def test_without_motion_the_lines_are_straight_and_four_voxels_apart():
    lines = columns_of_lines(draw(still(SIZE, SIZE))["grid"])
    # 64 / 16 lines -> every 4 voxels, from voxel 2, whose centre is at 2.5 * 4 - 0.5 pixels.
    np.testing.assert_allclose(lines, SCALE * (2.5 + 4 * np.arange(16)) - 0.5, atol=0.3)


@pytest.mark.parametrize("shift", [1.0, -0.5])
def test_a_translation_moves_the_lines_by_that_many_voxels(shift):
    u = still(SIZE, SIZE)
    u[0] = shift
    moved, before = (
        columns_of_lines(draw(u)["grid"]),
        columns_of_lines(draw(still(SIZE, SIZE))["grid"]),
    )
    np.testing.assert_allclose(moved - before, SCALE * shift, atol=0.3)


def test_along_axis_1_lines_move_down_in_a_picture_and_up_in_a_volume():
    def rows(u):
        return columns_of_lines(draw(u)["grid"].swapaxes(0, 1))

    picture, volume = still(SIZE, SIZE), still(SIZE, SIZE, 3)
    down, up = rows(picture), rows(volume)
    picture[1], volume[1] = 1, 1
    np.testing.assert_allclose(rows(picture) - down, SCALE, atol=0.3)
    np.testing.assert_allclose(rows(volume) - up, -SCALE, atol=0.3)


def test_a_volume_is_cut_amid_its_content():
    volume = np.zeros((20, 12, 10))
    volume[12:17, 2:9, 2:8] = 0.8
    volume[14, 4, 4] = 1.0  # the middle of the content, and not of the volume
    assert draw(still(20, 12, 10), volume, axis=0)["fixed"].max() == 255
    volume[14, 4, 4], volume[10, 4, 4] = 0.8, 1.0
    assert draw(still(20, 12, 10), volume, axis=0)["fixed"].max() < 250


def test_a_volume_cut_across_axis_0_is_bent_by_channels_1_and_2_only():
    u = still(5, SIZE, SIZE)
    before = draw(u, axis=0)["grid"]
    u[0] = 2
    assert np.array_equal(draw(u, axis=0)["grid"], before)
    u[1] = 1
    moved = columns_of_lines(draw(u, axis=0)["grid"]) - columns_of_lines(before)
    np.testing.assert_allclose(moved, SCALE, atol=0.3)


def test_a_contraction_brings_the_lines_together():
    u = still(SIZE, SIZE)
    u[:] = -0.2 * (np.indices((SIZE, SIZE)) - (SIZE - 1) / 2)  # x + u(x) = c + 0.8 (x - c)
    gaps = np.diff(columns_of_lines(draw(u)["grid"]))
    np.testing.assert_allclose(gaps, 0.8 * 4 * SCALE, atol=0.3)


def test_the_checkerboard_alternates_between_fixed_and_warped():
    white, black = np.ones((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    board = pictures.pictures(white, black, black, still(SIZE, SIZE))["checkerboard"][..., 0]
    squares = board.reshape(8, 32, 8, 32).swapaxes(1, 2)
    assert np.array_equal(squares.min((2, 3)), squares.max((2, 3)))
    assert np.array_equal(squares[:, :, 0, 0], 255 * (1 - np.indices((8, 8)).sum(0) % 2))


def test_the_overlay_is_magenta_and_green_before_and_grey_where_images_agree_after():
    left, right = np.zeros((2, SIZE, SIZE))
    left[:32], right[32:] = 1, 1
    overlay = pictures.pictures(left, right, left, still(SIZE, SIZE))["overlay"]
    before, after = overlay[:, :256], overlay[:, -256:]
    assert (before[:, :120] == (255, 0, 255)).all() and (before[:, 136:] == (0, 255, 0)).all()
    assert (after[:, :120] == 255).all() and (after[:, 136:] == 0).all()


def test_the_jacobian_is_white_without_motion_green_grown_purple_shrunk():
    def middle(factor):
        u = (factor - 1) * np.indices((SIZE, SIZE)).astype(np.float32)
        return draw(u)["jacobian"][150, 130].astype(int)

    red, green, blue = middle(1.3)  # det 1.69
    assert green > red and green > blue
    red, green, blue = middle(0.7)  # det 0.49
    assert green < red and green < blue
    assert middle(1.0).min() > 240


def test_only_folds_are_red_and_they_are_counted():
    u = still(SIZE, SIZE)
    calm = draw(u)["jacobian"]
    u[0, 30:34] = np.array([3, 1, -1, -3])[:, None]  # x + u runs backwards there
    torn = draw(u)["jacobian"]
    y, x = np.nonzero(is_red(torn) & ~is_red(calm))
    # det at 30 to 33: central differences (1 - 0) / 2, -2, -2, (0 + 1) / 2, and 1: folds at 31, 32.
    # The map begins 6 pixels from the left.
    assert (x.min(), x.max()) == (6 + 31 * SCALE, 6 + 33 * SCALE - 1)
    assert y.max() - y.min() >= 250


def test_the_title_tells_the_range_and_the_folds_of_the_whole_volume():
    u = still(16, 16, 16)
    u[2, :, :, :4] = np.array([0, -2, -4, -6])  # folded far from the middle slice
    # det = 1 - 2 on z = 0, 1, 2; (0 + 4) / 2 + 1 = 3 at z = 3; (0 + 6) / 2 + 1 = 4 at z = 4.
    # Folded are 3 of 16 slices.
    seen = pictures._slice([np.zeros((16, 16, 16))] * 3, u, determinant_of(u).numpy(), -1, 8, "lower")
    assert seen.title == "det J -1.00 to 4.00, folds 19 %"


def test_values_outside_0_to_1_and_nan_are_drawn_and_not_wrapped():
    image = np.array([[-1.0, 2.0], [np.nan, 0.5]]).repeat(128, 0).repeat(128, 1)
    picture = draw(still(256, 256), image)["fixed"][..., 0].T
    assert [picture[50, 50], picture[50, 200], picture[200, 50]] == [0, 255, 0]


def test_shapes_that_do_not_belong_together_and_unknown_origins_are_refused():
    image = np.zeros((8, 8))
    with pytest.raises(ValueError, match="do not belong together"):
        pictures.pictures(image, image, np.zeros((8, 9)), still(8, 8))
    with pytest.raises(ValueError, match="do not belong together"):
        pictures.pictures(image, image, image, np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="'upper' or 'lower'"):
        draw(still(8, 8), origin="left")


def test_a_contact_sheet_holds_every_picture_below_its_title():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    shown = [np.full((64, 64, 3), c, np.uint8) for c in colours]
    sheet = pictures.contact_sheet(shown, ["one", "two", "three"], width=150, height=64)
    for colour in colours:
        assert (sheet == colour).all(-1).sum() == 64 * 64
    red, green, blue = (np.argwhere((sheet == c).all(-1)).min(0) for c in colours)
    assert red[0] == green[0] < blue[0] and red[1] == blue[1] < green[1]  # two in a row, one below
    assert sheet[: red[0]].min() < 100  # ink above the first


def test_a_contact_sheet_of_a_picture_two_pixels_wide_is_made() -> None:
    thin = np.zeros((3000, 2, 3), np.uint8)
    assert pictures.contact_sheet([thin], ["thin"]).ndim == 3


def test_a_contact_sheet_needs_pictures_and_a_title_for_each():
    with pytest.raises(ValueError, match="no picture"):
        pictures.contact_sheet([], [])
    with pytest.raises(ValueError):
        pictures.contact_sheet([np.zeros((8, 8, 3), np.uint8)], [])


def test_a_saved_picture_reads_back_exactly_and_leaves_nothing_beside_it(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "new" / "picture.png"
    for _ in range(2):
        pictures.save_png(path, picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]

"""What is kept on disk is what would be made: by any process, until a file or a setting changes."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.folders import frames, two_folders
from helpers.opens import opens
from regpipe.data.cache import Store
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import list_pairs, working_grid
from regpipe.data.placement import Frames
from regpipe.transforms.affine import Alignment


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """To the bit, with types and strides."""
    tensors = [(a, other[key]) for key, a in one.items() if torch.is_tensor(a)]
    return one.keys() == other.keys() and all(
        torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in tensors
    )


@pytest.mark.parametrize("stage", ["none", "centre"])
def test_another_process_gets_the_same_tensors_and_affines_without_decoding_an_image(tmp_path, stage) -> None:
    cases = list_pairs(two_folders(tmp_path / "data", 3))
    grid, told = working_grid(cases), {"affine": stage, "cache_dir": str(tmp_path / "cache")}
    plain = [LoadPair(grid, affine=stage)(case) for case in cases]
    made = [LoadPair(grid, **told)(case) for case in cases]
    for path in (tmp_path / "data").rglob("*.nii.gz"):  # no voxel can be read any more
        when, whole = path.stat().st_mtime_ns, path.read_bytes()
        path.write_bytes(whole[:-8] + bytes(8))
        os.utime(path, ns=(when, when))
    kept = [LoadPair(grid, **told)(case) for case in cases]
    assert all(same(a, b) and same(a, c) for a, b, c in zip(plain, made, kept, strict=True))
    assert kept[0]["fixed_affine"].dtype == torch.float64


def test_a_changed_file_setting_or_grid_is_made_anew_and_changing_back_is_not(tmp_path) -> None:
    cases = list_pairs(frames(tmp_path / "data", 2))
    grid = working_grid(cases)

    def reads(size: tuple[int, ...] = grid.shape, **told: Any) -> int:
        with opens(tmp_path / "data") as opened:
            LoadPair(grid._replace(shape=size), cache_dir=str(tmp_path / "cache"), **told)(cases[0])
        return len(+opened)

    assert reads() == 2 and reads() == 0
    assert reads(mask_rims=False) == 2 and reads((5, 6)) == 2 and reads() == 0
    os.utime(cases[0]["moving_image"], ns=(1, 1))
    assert reads() == 1 and reads() == 0
    Path(cases[0]["moving_image"]).write_bytes(Path(cases[0]["fixed_image"]).read_bytes())
    assert reads() == 1


def test_a_damaged_file_is_named_and_made_again(tmp_path, caplog) -> None:
    store = Store(tmp_path / "cache")

    def get(value: float) -> float:
        return float(store.arrays([None], {"what": "a number"}, lambda: [value])[0])

    assert get(1.0) == 1.0 and get(2.0) == 1.0
    (file,) = store.folder.iterdir()
    sound = file.read_bytes()
    turned = sound.replace(np.float64(1.0).tobytes(), np.float64(1.5).tobytes())
    assert turned != sound
    for damage in (b"", b"not a tensor", sound[:-200], turned):
        file.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert get(3.0) == 3.0
        assert file.name in caplog.text and "made again" in caplog.text
        caplog.clear()
    assert get(4.0) == 3.0
    assert [file] == list(store.folder.iterdir())  # nothing half-written beside it


def test_what_cannot_be_made_leaves_nothing(tmp_path) -> None:
    store = Store(tmp_path / "cache")
    with pytest.raises(ZeroDivisionError):
        store.arrays([], {}, lambda: [1 / 0])
    assert not store.folder.exists()


def test_an_alignment_is_found_once_by_all_workers_and_runs(tmp_path, monkeypatch) -> None:
    cases = list_pairs(frames(tmp_path / "data", 3))
    asked, matrix = tmp_path / "asked", np.array([[0.9, 0.1, 1.5], [-0.1, 1.1, -0.5], [0, 0, 1]])

    def align(self: Frames, case: dict[str, str], read: object, stage: str) -> Alignment:
        with asked.open("a") as file:
            file.write(case["case"] + "\n")
        return Alignment(matrix, 0.8, 0.5, float("nan"))

    monkeypatch.setattr(Frames, "_align", align)
    context = multiprocessing.get_context("fork")  # the workers know of the stand-in

    def epochs(load: LoadPair) -> list[dict[str, Any]]:
        loader: Any = DataLoader(
            [*cases] * 2,  # type: ignore[arg-type]  # torch asks for a Dataset and takes a list
            num_workers=2,
            collate_fn=lambda x: collate_pairs([load(*x)]),
            multiprocessing_context=context,
        )
        return [batch for _ in range(2) for batch in loader]

    grid, cache_dir = working_grid(cases), str(tmp_path / "cache")
    expected = LoadPair(grid, affine="affine")(cases[0])
    asked.unlink()
    found = epochs(LoadPair(grid, affine="affine", cache_dir=cache_dir))
    for key in ("fixed_image", "moving_image", "moving_affine"):
        assert torch.equal(found[0][key][0], expected[key])
    times = len(asked.read_text().splitlines())
    assert len(cases) <= times <= 2 * len(cases)  # two workers may have begun one at the same time
    later = LoadPair(grid, affine="affine", cache_dir=cache_dir)
    later(cases[0])
    assert later.frames.found(cases[0])["affine_overlap"] == 0.8
    LoadPair(grid, affine="affine", affine_metric="ncc", cache_dir=cache_dir)(cases[0])
    assert len(asked.read_text().splitlines()) == times + 1  # asked for otherwise, found otherwise

"""Bundles, weights and datalists that are damaged or another's: one line each, see ``test_bad_input``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import badinput
from helpers.badinput import is_one_line, put, regpipe
from helpers.bundles import deforming_bundle
from regpipe.io.images import Grid
from regpipe.networks.symmetric import SymmetricNet


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deforming_bundle(tmp_path_factory.mktemp("model") / "bundle", Grid((32, 32), (1.0, 1.0)))


Change = Callable[[dict[str, torch.Tensor]], object]


def a_tensor(state: Mapping[str, torch.Tensor], value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state with another value for a tensor of the decoder."""
    return {**state, "levels.0.flow.weight": value}


def file_of(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda bundle: put(bundle / name, data)


def model_of(change: Change) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        model = bundle / "models" / "model.pt"
        torch.save(change(torch.load(model, weights_only=True)), model)

    return damage


def cut(bundle: Path) -> None:
    model = bundle / "models" / "model.pt"
    model.write_bytes(model.read_bytes()[:5000])


def misspelt(word: str, wrong: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        config = bundle / "configs" / "inference.yaml"
        config.write_text(config.read_text().replace(word, wrong))

    return damage


BUNDLES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights of another architecture": (
        model_of(lambda _: SymmetricNet(2, "resnet18").state_dict()),
        "models/model.pt: ",
    ),
    "weights of volumes": (model_of(lambda _: SymmetricNet(3, "alexnet").state_dict()), "model.pt: another network's"),
    "a tensor of another shape": (
        model_of(lambda state: a_tensor(state, torch.zeros(2, 3, 3, 3))),
        "model.pt: another network's weights ('levels.0.flow.weight' is (2, 3, 3, 3) where the bundle's network has",
    ),
    "a tensor too few": (
        model_of(lambda state: {k: v for k, v in state.items() if k != "levels.0.flow.weight"}),
        "model.pt: another network's weights ('levels.0.flow.weight' is missing",
    ),
    "a tensor NaN": (model_of(lambda state: a_tensor(state, torch.tensor(np.nan))), "model.pt: 'levels.0.flow.weight'"),
    "weights cut off": (cut, "models/model.pt: damaged"),
    "no bytes of weights": (file_of("models/model.pt", b""), "models/model.pt: damaged"),
    "no state dict": (model_of(lambda _: [1]), "models/model.pt: holds no state dict"),
    "no working grid": (lambda bundle: (bundle / "models" / "working_grid.json").unlink(), "working_grid.json: no"),
    "a grid of nothing": (file_of("models/working_grid.json", b"{}"), "working_grid.json: no working grid"),
    "a grid of NaN": (file_of("models/working_grid.json", b'{"shape": [9, 9], "spacing": [NaN, 1]}'), "grid.json: no"),
    "a grid of volumes": (
        file_of("models/working_grid.json", b'{"shape": [8, 8, 8], "spacing": [1, 1, 1]}'),
        "model.pt: another network's weights",
    ),
    "a record that is a list": (file_of("models/training.json", b"[]"), "models/training.json: damaged"),
    "a record cut off": (file_of("models/training.json", b'{"pairing":'), "models/training.json: damaged"),
    "no YAML": (file_of("configs/inference.yaml", b"a: ["), "configs: not a bundle's configuration"),
    "YAML of nothing known": (file_of("configs/inference.yaml", b"a: 1"), "configuration: run ID 'run'"),
    "a YAML list": (file_of("configs/inference.yaml", b"- a"), "configs: not a bundle's configuration"),
    "an unknown reference": (misspelt("'@load'", "'@laod'"), "configuration: the referring item `@laod`"),
    "an unknown class": (misspelt("regpipe.SymmetricNet", "regpipe.Net"), "configuration: Cannot locate"),
    "metadata cut off": (file_of("configs/metadata.json", b"{"), "configs: not a bundle's configuration"),
    "no logging.conf": (file_of("configs/logging.conf", b"loud"), "configs: not a bundle's configuration"),
}


@pytest.mark.parametrize("damage", BUNDLES)
def test_a_damaged_bundle_is_refused_before_anything_is_written(
    damage: str, tmp_path: Path, cohort: Path, bundle: Path
) -> None:
    change, said = BUNDLES[damage]
    change(shutil.copytree(bundle, tmp_path / "bundle"))
    told = regpipe("register", cohort, "--bundle", tmp_path / "bundle", "-o", tmp_path / "out", "--trust")
    assert told.status == 1 and len(told.lines) == 1
    is_one_line(told.error, said)
    assert not (tmp_path / "out").exists()


# --- datalists ---

LISTS: dict[str, tuple[bytes, str]] = {
    "cut off": (b"[", "not a datalist"),
    "an empty list": (b"[]", "has no case"),
    "nothing": (b"{}", "has no case"),
    "a number of cases": (b'{"training": 3}', "not a datalist"),
    "nested too deeply": (b"[" * 100_000, "nested too deeply"),
    "no Unicode": (b'{"training": "\xff"}', "not a datalist"),
    "a number of 5000 digits": (b'{"training": ' + b"9" * 5000 + b"}", "not a datalist"),
}


@pytest.mark.parametrize("mistake", LISTS)
def test_a_datalist_that_is_none_is_named(mistake: str, tmp_path: Path) -> None:
    data, said = LISTS[mistake]
    put(tmp_path / "list.json", data)
    told = regpipe("register", tmp_path / "list.json", "-o", tmp_path / "out")
    assert told.status == 1 and len(told.lines) == 1
    is_one_line(told.error, "list.json: ", said)
    assert not (tmp_path / "out").exists()


ENTRIES: list[tuple[object, str]] = [
    ("a", "a case is a dict of paths"),
    ({"fixed_image": "good.nii"}, "a case without moving_image"),
    ({"fixed_imag": "good.nii"}, "unknown key 'fixed_imag'"),
    ({"fixed_image": 5, "moving_image": "good.nii"}, "fixed_image is a path, not 5"),
    ({"fixed_image": "gone.nii", "moving_image": "good.nii"}, "gone.nii: no such file"),
    ({"fixed_image": "/dev/null", "moving_image": "good.nii"}, "/dev/null: no such file"),
    ({"fixed_image": "x" * 5000, "moving_image": "good.nii"}, "no such file"),
    ({"fixed_image": "\ud800\0\x1b[2J", "moving_image": "good.nii"}, "\\ud800\\x00\\x1b[2J: no such file"),
]
NAMES: tuple[object, ...] = ("", "..", "../outside", "/outside", "two\nlines", None, {})
ENTRIES += [({"fixed_image": "good.nii", "moving_image": "good.nii", "case": n}, "give another name") for n in NAMES]
# known to be wrong only when its folder cannot be made, so it comes last
ENTRIES += [({"fixed_image": "good.nii", "moving_image": "good.nii", "case": "n" * 300}, "File name too long")]


def test_the_bad_cases_of_a_datalist_are_named_and_the_good_one_is_done(tmp_path: Path) -> None:
    put(tmp_path / "good.nii", badinput.RAW)
    good = {"fixed_image": "good.nii", "moving_image": "good.nii", "case": 7}
    file = tmp_path / "list.json"
    file.write_text(json.dumps({"test": [*(entry for entry, _ in ENTRIES), good]}))
    told = regpipe("register", file, "-o", tmp_path / "out", "--refine", 2, "--affine", "none")
    lines = [*told.result["failures"].values()]
    assert told.status == 1 and len(lines) == len(ENTRIES)
    for (_, said), line in zip(ENTRIES, lines, strict=True):
        is_one_line(line, said)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"7", "metrics.csv"}
    assert {path.name for path in tmp_path.iterdir()} == {"good.nii", "list.json", "out"}
    file.write_text(json.dumps({"test": [good, good]}))
    is_one_line(regpipe("register", file, "-o", tmp_path / "out").error, "list.json: has two cases named 7")

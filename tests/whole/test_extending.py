"""What docs/extending.md adds from outside the package is used, shown and judged like what is built in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from helpers.docpages import blocks
from helpers.places import ROOT
from helpers.registries import restored
from regpipe import InputError, SymmetricNet, list_pairs
from regpipe.bundle.write import write_bundle
from regpipe.engines.evaluation import table
from regpipe.inference.from_zero import register_from_zero
from regpipe.metrics.cases import read_rows
from regpipe.metrics.thresholds import thresholds
from regpipe.phantoms.cohort import write_cohort
from regpipe.report import figures, pictures
from regpipe.report.qc_page import write_report
from regpipe.report.tensorboard_pages import layout

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    """Every snippet of the page, run."""
    with restored():
        for block in blocks(PAGE, "python"):
            exec(compile(block.text, "extending.md", "exec"), {})
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("pairs") / "in", shape=(32, 32), n_pairs=1)


def test_a_pair_is_registered_by_it_measured_judged_written_and_drawn(pairs: Path, tmp_path: Path) -> None:
    register_from_zero(str(pairs), str(tmp_path), affine="none", similarity="mae", steps=20, formats="itk,text")
    (case,) = list_pairs(pairs)
    folder = tmp_path / case["case"]

    told = json.loads((folder / "transform.json").read_text())["moving_to_fixed"]
    assert told["text"] == "moving_to_fixed_affine.txt" and told["text"] in told["sha256"]
    assert np.allclose(np.loadtxt(folder / told["text"]), np.eye(3))  # nothing was aligned

    (row,) = read_rows(tmp_path / "metrics.csv")
    assert 0 < row["mae"] < row["mae_before"]  # what was minimised is what is measured
    page, (found,) = write_report(tmp_path, thresholds(given=["mae=0,0.0001"]))
    assert found.verdict.steps["mae"] == "fail" and "grey values" not in page.read_text()
    write_report(tmp_path, thresholds())
    assert "MAE" in page.read_text() and "grey values are in [0, 1]" in page.read_text()


def test_tables_and_charts_have_its_columns() -> None:
    assert table({"a": {"mae": [0.1, 0.1, 0.1]}}).startswith("| | MAE |")
    charts = layout()["Similarity"]
    assert charts["MAE, held-out pairs"] == ["Multiline", ["validation/mae$"]]
    assert "|mae)" in charts["similarity terms, training pairs"][1][0]


def test_a_backbone_makes_networks_in_2d_and_3d_and_has_a_bundle_and_a_look_of_its_own(tmp_path: Path) -> None:
    for dim in (2, 3):
        pair, network = torch.rand(1, 2, *[33] * dim), SymmetricNet(dim, "tiny").eval()
        with torch.no_grad():
            there, back = network(pair), network(pair.flip(1))
        assert torch.equal(there, -back)  # the theorem of the network, whatever its encoder
    assert "backbone: tiny" in (write_bundle("tiny", tmp_path) / "configs" / "train.yaml").read_text()
    assert figures.look("tiny") not in [figures.look(name) for name in ("resnet18", "vgg16", "alexnet", "plain")]


def test_a_picture_is_drawn_from_what_the_others_are() -> None:
    image = np.zeros((32, 32))
    image[8:20, 8:20] = 1
    drawn = pictures.pictures(image, image[::-1], image, np.zeros((2, 32, 32)))
    assert [*drawn][-1] == "difference" and not drawn["difference"].any()  # fixed and warped are the same


def test_an_overlay_imports_the_module(tmp_path: Path) -> None:
    (overlay,) = blocks(PAGE, "yaml")
    (tmp_path / "mine.yaml").write_text(overlay.text)
    train = ROOT / "bundles" / "symreg_resnet18" / "configs" / "train.yaml"
    found = ConfigParser.load_config_files([str(train), str(tmp_path / "mine.yaml")])
    assert found["imports"][-1] == "$import mine" and {"lncc", "mae"} <= found["loss_weights"].keys()


def test_an_unknown_name_lists_it() -> None:
    with pytest.raises(InputError, match="mse, .*mae"):
        register_from_zero("none", "none", similarity="mea")

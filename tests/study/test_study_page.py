"""What a study says: intervals with known answers, and pages of made-up runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.places import ROOT
from regpipe.cli import main as cli
from regpipe.metrics.metric import columns
from regpipe.report import figures
from regpipe.study import page
from regpipe.study.effects import LEVEL, Effect, effects, levels, paired, write_effects, write_runs
from regpipe.study.page import write_page
from regpipe.utils.errors import InputError

PUBLISHED = ROOT / "docs" / "results" / "study"

RNG = np.random.default_rng(0)
ENDS = [["a", "b"], ["b", "a"], ["a", "c"], ["d", "c"]]


def made(backbone: str, transfer: str, subjects: int, seed: int, dice: list[float]) -> dict[str, Any]:
    cases = {name: [0.5] * len(dice) for name in columns()} | {"dice": dice}
    cell = {"dims": 2, "backbone": backbone, "transfer": transfer, "subjects": subjects, "seed": seed}
    costs = {"steps": 10, "seconds": 3.0, "cpu_seconds": 2.0, "parameters": 2_000_000, "trainable": 1_000_000}
    return {**cell, **costs, "gflop": 1.5, "cases": cases, "metrics": {k: float(np.mean(v)) for k, v in cases.items()}}


def test_a_difference_that_is_always_the_same_has_no_interval() -> None:
    a = RNG.random((3, 4))
    assert paired(a + 0.25, a, ENDS) == pytest.approx((0.25, 0.25, 0.25))


def test_with_two_subjects_only_the_seeds_are_left_to_chance() -> None:
    # Both pairs hold both subjects: a draw counts only if it has each once, and then it is the sample itself.
    # Two seeds: both the first, one of each, both the second, with probabilities 1/4, 1/2, 1/4.
    a = np.array([[0.1, 0.3], [0.5, 0.9]])
    assert paired(a, np.zeros_like(a), [["a", "b"], ["b", "a"]]) == pytest.approx((0.45, 0.2, 0.7))


def test_pairs_that_share_their_subjects_are_no_independent_evidence() -> None:
    subjects = [str(i) for i in range(8)]
    ends = [[m, f] for m in subjects for f in subjects if m != f]
    own = dict(zip(subjects, RNG.normal(0, 0.1, 8), strict=True))  # each subject is easy or hard, whatever its partner
    a = np.array([[own[m] + own[f] for m, f in ends]])
    _, low, high = paired(a, np.zeros_like(a), ends)
    naive = 2 * 1.96 * a.std() / np.sqrt(a.size)  # as if the 56 pairs were 56 draws
    truth = 2 * 1.96 * 2 * np.std(list(own.values())) / np.sqrt(8)  # a mean of 8 subjects, each counted twice
    assert 0.7 * truth < high - low < 1.5 * truth and high - low > 1.5 * naive


def test_a_pair_without_a_value_counts_on_neither_side() -> None:
    a, b = np.full((2, 4), 0.7), np.full((2, 4), 0.5)
    a[1, 2], b[0, 2] = np.nan, 0.1
    assert paired(a, b, ENDS) == pytest.approx((0.2, 0.2, 0.2))


def test_effects_compare_the_same_seeds_and_sizes() -> None:
    runs = [made("plain", "scratch", 5, seed, [0.5, 0.5, 0.5, 0.5]) for seed in (0, 1)]
    runs += [made("plain", "frozen", 5, seed, [0.6, 0.6, 0.6, 0.6]) for seed in (0, 1, 2)]
    runs += [made("vgg16", "frozen", 5, 2, [0.4, 0.4, 0.4, 0.4]), made("vgg16", "frozen", 20, 2, [0.9] * 4)]
    found = {(e.effect, e.backbone, e.transfer, e.subjects, e.seeds): round(e.mean, 6) for e in effects(runs, ENDS)}
    assert found == {
        ("frozen - scratch", "plain", "frozen", 5, 2): 0.1,
        ("vgg16 - plain", "vgg16", "frozen", 5, 1): -0.2,
    }


def test_a_kind_of_run_stands_at_the_mean_of_its_seeds_and_pairs() -> None:
    runs = [made("plain", "scratch", 5, seed, [0.5 + seed / 10] * 4) for seed in (0, 1, 2)]
    runs += [made("plain", "frozen", 5, 0, [0.25] * 4)]
    first, second = levels(runs, ENDS)
    assert first[:5] == (LEVEL, "plain", "scratch", 5, 3) and second == (
        LEVEL,
        "plain",
        "frozen",
        5,
        1,
        0.25,
        0.25,
        0.25,
    )
    assert first.mean == pytest.approx(0.6)
    # the mean of three seeds drawn from 0.5, 0.6, 0.7: only 1 of 27 draws gives each end, so 95 % keeps both
    assert (first.low, first.high) == (pytest.approx(0.5), pytest.approx(0.7))


def written(out: Path) -> Path:
    """Twelve runs and their CSVs; frozen weights are better by 0.1, the three seeds 0.01 apart."""
    (out / "2d" / "runs").mkdir(parents=True)
    (out / "2d" / "study.json").write_text(json.dumps({"held_out": ENDS}))
    for transfer, gain in (("scratch", 0.0), ("frozen", 0.1)):
        for subjects in (5, 20):
            for seed in (0, 1, 2):
                run = made("alexnet", transfer, subjects, seed, [0.5 + gain + seed / 100] * 4)
                (out / "2d" / "runs" / f"{transfer} {subjects} {seed}.json").write_text(json.dumps(run))
    write_runs(out)
    write_effects(out)
    return out


def test_the_page_has_each_kind_of_run_and_each_difference_with_its_interval(tmp_path: Path) -> None:
    page = write_page(written(tmp_path))
    assert "| alexnet, scratch | 0.510 [0.500, 0.520] | 0.510 [0.500, 0.520] |" in page
    assert "| alexnet, frozen | 0.610 [0.600, 0.620] | 0.610 [0.600, 0.620] |" in page
    assert "| frozen - scratch | alexnet | 20 | 3 | 0.1000 [0.1000, 0.1000] |" in page
    assert "4 held-out pairs, 10 steps a run; Dice before registration 0.500." in page
    assert (tmp_path / "study.md").read_text() == page
    with (tmp_path / "study.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12 and rows[0]["dims"] == "2" and float(rows[-1]["dice"]) == pytest.approx(0.52)
    with (tmp_path / "effects.csv").open(newline="") as stream:
        means = {
            (row["effect"], row["transfer"], row["subjects"]): float(row["mean"]) for row in csv.DictReader(stream)
        }
    assert means == {
        **{("dice", "scratch", size): pytest.approx(0.51) for size in ("5", "20")},
        **{("dice", "frozen", size): pytest.approx(0.61) for size in ("5", "20")},
        **{("frozen - scratch", "frozen", size): pytest.approx(0.1) for size in ("5", "20")},
    }


def test_page_and_figures_are_made_again_from_the_two_csvs_alone_byte_for_byte(tmp_path: Path) -> None:
    first = written(tmp_path / "a")
    write_page(first)
    again = tmp_path / "b"
    again.mkdir()
    for name in ("study.csv", "effects.csv"):
        (again / name).write_bytes((first / name).read_bytes())
    assert CliRunner().invoke(cli.app, ["figures", str(again)]).exit_code == 0
    made_again = {path.name: path.read_bytes() for path in again.iterdir()}
    drawn = {f"{name}_2d.{suffix}" for name in ("dice", "transfer", "cost") for suffix in ("svg", "png")}
    assert made_again.keys() == {"study.csv", "effects.csv", "study.md", *drawn}  # no plain encoder: nothing of depth
    assert all(content == (first / name).read_bytes() and len(content) > 200 for name, content in made_again.items())
    assert b"alexnet" in made_again["dice_2d.svg"]  # text stays text


def test_the_figures_show_the_numbers_of_the_csvs(tmp_path: Path) -> None:
    found = [
        Effect(LEVEL, "vgg16", transfer, size, 3, mean, mean - 0.1, mean + 0.2)
        for transfer, size, mean in (("scratch", 5, 0.5), ("scratch", 20, 0.6), ("frozen", 20, 0.7))
    ]
    found.append(Effect("vgg16 - plain", "vgg16", "scratch", 20, 3, 0.02, -0.01, 0.05))
    axes: Any = page.dice_figure(found).axes
    (panel,) = axes
    assert panel.get_title() == "vgg16" and panel.get_ylabel().startswith("Dice")
    lines = {container.get_label(): container.lines[0] for container in panel.containers}
    assert list(lines["scratch"].get_ydata()) == [0.5, 0.6] and list(lines["frozen"].get_ydata()) == [0.7]
    bars = panel.containers[0].lines[2][0].get_segments()
    assert [list(bar[:, 1]) for bar in bars] == [pytest.approx([0.4, 0.7]), pytest.approx([0.5, 0.8])]
    assert page.effect_figures(found).keys() == {"depth"}
    runs = [
        {"backbone": "vgg16", "transfer": transfer, "subjects": 20, "parameters": 3e6, "gflop": 2.0, "cpu_seconds": s}
        for transfer, s in (("scratch", 4.0), ("scratch", 6.0), ("frozen", 1.0))
    ]
    axes = page.cost_figure(runs, found).axes
    parameters, _, seconds = axes
    assert [float(c.lines[0].get_xdata()[0]) for c in seconds.containers] == [5.0, 1.0]
    aside = [float(c.lines[0].get_xdata()[0]) for c in parameters.containers]
    assert np.mean(aside) == pytest.approx(3) and aside[0] < 3 < aside[1]  # beside each other, not over


def test_a_file_that_is_no_studys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="study.csv: missing"):
        write_page(tmp_path)
    written(tmp_path)
    lines = (tmp_path / "study.csv").read_text()
    for name, planted in (("alexnet", "<img src=x>"), ("alexnet", "[a](javascript:b)"), ("\n2,", "\n../../x,")):
        (tmp_path / "study.csv").write_text(lines.replace(name, planted, 1))
        with pytest.raises(InputError, match=r"study.csv: line 2: .*; take the file as regpipe study writes it"):
            write_page(tmp_path)
    (tmp_path / "study.csv").write_text(lines)
    (tmp_path / "effects.csv").write_text("dims,effect\n2,dice\n")
    with pytest.raises(InputError, match="effects.csv: has no column backbone, transfer"):
        write_page(tmp_path)


def test_the_published_page_says_what_its_csvs_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, stem: None)
    for name in ("study.csv", "effects.csv"):
        (tmp_path / name).write_bytes((PUBLISHED / name).read_bytes())
    page = write_page(tmp_path)
    assert page == (PUBLISHED / "study.md").read_text()
    assert all((PUBLISHED / name).is_file() for name in re.findall(r"\]\((\S+?\.svg)\)", page))

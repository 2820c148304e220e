"""What a study says: intervals with known answers, and pages of made-up runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from helpers.places import ROOT
from regpipe.cli import main as cli
from regpipe.metrics.metric import columns
from regpipe.report import figures
from regpipe.study import page
from regpipe.study.effects import (
    LEVEL,
    Effect,
    effects,
    estimate,
    levels,
    soon,
    with_intervals,
    write_effects,
    write_runs,
)
from regpipe.study.further import FURTHER
from regpipe.study.page import verdicts, write_page
from regpipe.utils.errors import InputError

PUBLISHED = ROOT / "docs" / "results" / "study"

RNG = np.random.default_rng(0)
ENDS = [["a", "b"], ["b", "a"], ["a", "c"], ["d", "c"]]


def made(backbone: str, transfer: str, subjects: int, seed: int, dice: list[float]) -> dict[str, Any]:
    cases = {name: [0.5] * len(dice) for name in columns()} | {"dice": dice}
    cell = {"dims": 2, "backbone": backbone, "transfer": transfer, "subjects": subjects, "seed": seed}
    costs = {"steps": 10, "seconds": 3.0, "cpu_seconds": 2.0, "parameters": 2_000_000, "trainable": 1_000_000}
    further = dict.fromkeys(FURTHER, 0.7)
    return {
        **cell,
        **costs,
        "gflop": 1.5,
        "further": further,
        "curve": [(0, 0.0, 0.3), (10, 2.0, dice[0])],
        "cases": cases,
        "metrics": {k: float(np.mean(v)) for k, v in cases.items()},
    }


def test_a_difference_that_is_always_the_same_has_no_interval() -> None:
    found = estimate(np.full((3, 4), 0.25), ENDS)
    assert (found.mean, found.error, *found.by_seed) == pytest.approx((0.25, 0, 0.25, 0.25, 0.25))
    (effect,) = with_intervals({("frozen - scratch", "plain", "frozen", 5): found})
    assert effect[5:10] == pytest.approx([0.25] * 5) and effect.p < 1e-6


def test_with_two_subjects_only_the_seeds_are_left_to_chance() -> None:
    # Both pairs hold both subjects: a draw counts only if it has each once, and then it is the sample itself.
    found = estimate(np.array([[0.1, 0.3], [0.5, 0.9]]), [["a", "b"], ["b", "a"]])
    assert found.error == pytest.approx(0, abs=1e-12) and [*found.by_seed] == pytest.approx([0.2, 0.7])
    (effect,) = with_intervals({("frozen - scratch", "plain", "frozen", 5): found})
    t = stats.ttest_1samp([0.2, 0.7], 0)  # of one difference Student's own test
    assert effect.p == pytest.approx(t.pvalue) and effect[6:8] == pytest.approx(t.confidence_interval(0.95))
    assert effect[8:10] == pytest.approx(t.confidence_interval(0.9))


def test_how_much_seeds_differ_is_told_by_all_differences_of_as_many_subjects() -> None:
    same = [["a", "b"], ["b", "a"]]  # nothing between subjects
    values = {"frozen": [0.01, 0.03, 0.02], "finetuned": [0.2, 0.26, 0.2], "imagenet-frozen": [0.5]}
    found = {
        (f"{kind} - scratch", "plain", kind, 5): estimate(np.array(x)[:, None] + np.zeros((1, 2)), same)
        for kind, x in values.items()
    }
    other = ("frozen - scratch", "plain", "frozen", 20)
    first, second, third, alone = with_intervals({**found, other: estimate(np.array([[0.1, 0.1]]), same)})
    pooled = (2 * np.var([1, 3, 2], ddof=1) + 2 * np.var([20, 26, 20], ddof=1)) / 4 / 1e4
    for effect, n in ((first, 3), (second, 3), (third, 1)):
        reach = stats.t(4).ppf(0.975) * np.sqrt(pooled / n)
        assert (effect.low, effect.high) == pytest.approx((effect.mean - reach, effect.mean + reach))
    assert np.isnan(alone.p) and alone.low == pytest.approx(alone.high)  # one seed, and no other tells
    assert verdicts([alone]) == ["equal" if abs(alone.mean) < 0.01 else "open"]


def test_by_chance_alone_no_more_differences_are_told_than_is_said() -> None:
    rng, subjects = np.random.default_rng(3), 12
    pairs = [(m, f) for m in range(subjects) for f in range(subjects) if m != f]
    ends, p = [[str(m), str(f)] for m, f in pairs], []
    for _ in range(40):
        scratch = rng.normal(0, 0.01, 3)  # which all eight differences share
        found = {}
        for kind in range(8):
            easy, seeds = rng.normal(0, 0.005, subjects), rng.normal(0, 0.01, 3) - scratch
            noise = rng.normal(0, 0.02, (3, len(pairs))) + [easy[m] + easy[f] for m, f in pairs]
            found[str(kind), "plain", "frozen", 5] = estimate(seeds[:, None] + noise, ends, draws=100)
        p += [effect.p for effect in with_intervals(found)]
    assert np.mean(np.array(p) < 0.05) < 0.07


def test_pairs_that_share_their_subjects_are_no_independent_evidence() -> None:
    subjects = [str(i) for i in range(8)]
    ends = [[m, f] for m in subjects for f in subjects if m != f]
    own = dict(zip(subjects, RNG.normal(0, 0.1, 8), strict=True))  # each subject is easy or hard, whatever its partner
    a = np.array([[own[m] + own[f] for m, f in ends]])
    error = estimate(a, ends).error
    naive = a.std() / np.sqrt(a.size)  # as if the 56 pairs were 56 draws
    truth = 2 * np.std(list(own.values())) / np.sqrt(8)  # a mean of 8 subjects, each counted twice
    assert 0.7 * truth < error < 1.5 * truth and error > 1.5 * naive


def test_a_pair_without_a_value_counts_on_neither_side() -> None:
    values = np.full((2, 4), 0.2)
    values[1, 2], values[0, 2] = np.nan, 0.1
    assert (estimate(values, ENDS).mean, *estimate(values, ENDS).by_seed) == pytest.approx((0.2, 0.2, 0.2))
    nothing = with_intervals({("frozen - scratch", "plain", "frozen", 5): estimate(values * np.nan, ENDS)})
    assert verdicts(nothing) == ["open"]


def test_effects_compare_the_same_seeds_and_sizes() -> None:
    runs = [made("plain", "scratch", 5, seed, [0.5, 0.5, 0.5, 0.5]) for seed in (0, 1)]
    runs += [made("plain", "frozen", 5, seed, [0.6, 0.6, 0.6, 0.6]) for seed in (0, 1, 2)]
    runs += [made("vgg16", "frozen", 5, 2, [0.4, 0.4, 0.4, 0.4]), made("vgg16", "frozen", 20, 2, [0.9] * 4)]
    found = {(e.effect, e.backbone, e.transfer, e.subjects, e.seeds): round(e.mean, 6) for e in effects(runs, ENDS)}
    assert found == {
        ("frozen - scratch", "plain", "frozen", 5, 2): 0.1,
        ("vgg16 - plain", "vgg16", "frozen", 5, 1): -0.2,
    }


def test_a_transfer_is_compared_over_all_backbones_that_have_it_on_the_seeds_of_all() -> None:
    gains = {"alexnet": {0: 0.1, 1: 0.2, 2: 0.9}, "vgg16": {0: 0.3, 1: 0.2}}
    runs = [
        made(backbone, transfer, 5, seed, [0.4 + (gain if transfer == "frozen" else 0)] * 4)
        for backbone, of_seed in gains.items()
        for seed, gain in of_seed.items()
        for transfer in ("scratch", "frozen")
    ]
    found = {(e.backbone, e.seeds): e.mean for e in effects(runs, ENDS)}
    assert found == pytest.approx({("all", 2): 0.2, ("alexnet", 3): 0.4, ("vgg16", 2): 0.25})


def test_a_run_is_nearly_there_where_training_from_scratch_is_in_the_end() -> None:
    scratch = [(0, 0.0, 0.5), (5, 1.0, 0.55), (50, 10.0, 0.68), (100, 20.0, 0.7)]
    assert soon(scratch, scratch) == (100, 20.0)  # 95 % of the gain is 0.69
    assert soon([(0, 0.0, 0.5), (5, 2.0, 0.695), (50, 20.0, 0.6)], scratch) == (5, 2.0)
    assert np.isnan(soon([(0, 0.0, 0.7), (5, 2.0, 0.6)], scratch)).all()


def test_a_kind_of_run_stands_at_the_mean_of_its_seeds_and_pairs() -> None:
    runs = [made("plain", "scratch", 5, seed, [0.5 + seed / 10] * 4) for seed in (0, 1, 2)]
    runs += [made("plain", "frozen", 5, 0, [0.25] * 4)]
    first, second = levels(runs, ENDS)
    assert first[:5] == (LEVEL, "plain", "scratch", 5, 3) and second[:5] == (LEVEL, "plain", "frozen", 5, 1)
    reach = 0.1 * stats.t(2).ppf(0.975)  # three seeds, 0.1 apart; the one of the other has their spread
    for level, mean, n in ((first, 0.6, 3), (second, 0.25, 1)):
        assert level[5:8] == pytest.approx((mean, mean - reach / n**0.5, mean + reach / n**0.5))


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
    assert "| alexnet, scratch | 0.510 [0.494, 0.526] | 0.510 [0.494, 0.526] |" in page
    assert "| alexnet, frozen | 0.610 [0.594, 0.626] | 0.610 [0.594, 0.626] |" in page
    assert "| frozen - scratch | alexnet | 20 | 3 | 0.1000 [0.1000, 0.1000] | above |" in page
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


def near(mean: float, *, low: float = -0.1, high: float = 0.2, p: float = 0.5) -> tuple[float, ...]:
    """The numbers of an effect: 95 % and 90 % intervals around its mean."""
    return (mean, mean + low, mean + high, mean + low / 2, mean + high / 2, p)


def test_a_difference_is_told_by_holms_correction_and_sameness_by_two_one_sided_tests() -> None:
    given = [
        (near(0.03, p=0.02), "open"),  # the second of three that are left: 0.02 x 3 is not under 0.05
        (near(-0.05, p=0.001), "below"),
        (near(0.001, low=-0.01, high=0.01, p=0.9), "equal"),
        (near(0.006, low=-0.01, high=0.01, p=0.8), "open"),  # the 90 % interval ends at 0.011
    ]
    found = [Effect("frozen - scratch", "plain", "frozen", 5, 3, *numbers) for numbers, _ in given]
    assert verdicts(found) == [verdict for _, verdict in given]
    assert verdicts(found[:1]) == ["above"]


def test_the_figures_show_the_numbers_of_the_csvs(tmp_path: Path) -> None:
    found = [
        Effect(LEVEL, "vgg16", transfer, size, 3, *near(mean))
        for transfer, size, mean in (("scratch", 5, 0.5), ("scratch", 20, 0.6), ("frozen", 20, 0.7))
    ]
    found.append(Effect("vgg16 - plain", "vgg16", "scratch", 20, 3, *near(0.02)))
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

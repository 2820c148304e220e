"""What a study says: intervals with known answers, and pages of made-up runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regpipe.studypage import METRICS, effects, paired, write_page

RNG = np.random.default_rng(0)
ENDS = [["a", "b"], ["b", "a"], ["a", "c"], ["d", "c"]]


def made(backbone: str, transfer: str, subjects: int, seed: int, dice: list[float]) -> dict[str, Any]:
    cases = {name: [0.5] * len(dice) for name in METRICS} | {"dice": dice}
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


def written(out: Path) -> Path:
    (out / "2d" / "runs").mkdir(parents=True)
    (out / "2d" / "study.json").write_text(json.dumps({"held_out": ENDS}))
    for transfer, gain in (("scratch", 0.0), ("frozen", 0.1)):
        for subjects in (5, 20):
            for seed in (0, 1, 2):
                run = made("alexnet", transfer, subjects, seed, [0.5 + gain + seed / 100] * 4)
                (out / "2d" / "runs" / f"{transfer} {subjects} {seed}.json").write_text(json.dumps(run))
    return out


def test_the_page_has_each_kind_of_run_with_the_reach_of_its_seeds(tmp_path: Path) -> None:
    page = write_page(written(tmp_path))
    assert "| alexnet, scratch | 0.510 [0.500, 0.520] | 0.510 [0.500, 0.520] |" in page
    assert "| alexnet, frozen | 0.610 [0.600, 0.620] | 0.610 [0.600, 0.620] |" in page
    assert "| frozen - scratch | alexnet | 20 | 3 | 0.1000 [0.1000, 0.1000] |" in page
    assert (tmp_path / "study.md").read_text() == page
    with (tmp_path / "study.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12 and rows[0]["dims"] == "2" and float(rows[-1]["dice"]) == pytest.approx(0.52)
    with (tmp_path / "effects.csv").open(newline="") as stream:
        assert [float(row["mean"]) for row in csv.DictReader(stream)] == pytest.approx([0.1, 0.1])


def test_the_plots_are_the_same_bytes_for_the_same_runs(tmp_path: Path) -> None:
    both = [written(tmp_path / name) for name in ("a", "b")]
    for out in both:
        write_page(out)
    for name in ("dice_2d", "cost_2d"):
        for suffix in ("svg", "png"):
            first, second = ((out / f"{name}.{suffix}").read_bytes() for out in both)
            assert first == second and len(first) > 1000
    assert b"alexnet" in (both[0] / "dice_2d.svg").read_bytes()

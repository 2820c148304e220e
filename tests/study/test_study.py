"""The study in small: equal terms, nothing run twice, nothing lost."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from scipy.ndimage import gaussian_filter

from helpers.folders import save
from helpers.places import ROOT
from regpipe.data.pairs import list_pairs
from regpipe.provenance.verify import verify
from regpipe.study import runs
from regpipe.study import study as study_module
from regpipe.study.runs import Task, run, run_all
from regpipe.study.study import choose, study
from regpipe.utils.errors import InputError

CONFIGS = ROOT / "configs"
GRID = {"backbone": ["alexnet", "plain"], "subjects": ["3", "all"], "seed": ["0"]}


def subject(i: int, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc of label 1 with a core of label 2 in noise."""
    rng = np.random.default_rng(i)
    at = np.indices((24, 20, 16)[:dims]) - rng.uniform(7, 10, dims).reshape(-1, *[1] * dims)
    reach = np.sqrt((at**2).sum(0))
    label = (reach < 6).astype(np.uint8) + (reach < 3)
    return gaussian_filter(label + rng.normal(0, 0.1, label.shape), 0.7).astype(np.float32), label.astype(np.uint8)


def cohort_of(root: Path, *, dims: int = 2, n: int = 7) -> Path:
    for i in range(n):
        for name, array in zip(("images", "labels"), subject(i, dims), strict=True):
            save(root / name / f"s{i}.nii.gz", array)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cohort_of(tmp_path_factory.mktemp("study") / "data")


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The overlays that are shipped, cut down to seconds."""
    folder = tmp_path_factory.mktemp("overlays")
    small = "holdout: 3\nmax_val_pairs: 4\nmax_epochs: 2\npairs_per_epoch: 8\nbatch_size: 4\n"
    texts = {
        "study": (CONFIGS / "study_2d.yaml", small),
        "pretrain": (CONFIGS / "pretrain.yaml", "max_epochs: 1\npairs_per_epoch: 4\nphantom_pairs: 4\nholdout: 1\n"),
    }
    for name, (shipped, ours) in texts.items():
        changed = {line.partition(":")[0] for line in ours.splitlines()}
        kept = [line for line in shipped.read_text().splitlines() if line.partition(":")[0] not in changed]
        (folder / f"{name}.yaml").write_text("\n".join(kept) + "\n" + ours)
    return {name: folder / f"{name}.yaml" for name in texts}


@pytest.fixture(scope="module")
def done(data: Path, overlays: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study. Do not write into it."""
    out = tmp_path_factory.mktemp("done") / "out"
    study(data, out, overlays=[overlays["study"]], pretraining=overlays["pretrain"], only=GRID)
    return out


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "study.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_cell_of_the_grid_is_a_line_on_equal_terms(done: Path) -> None:
    rows = rows_of(done)
    cells = {(row["backbone"], row["transfer"], row["subjects"]) for row in rows}
    assert len(rows) == 12
    assert cells == set(itertools.product(("alexnet", "plain"), ("scratch", "frozen", "finetuned"), ("3", "4")))
    assert {row["steps"] for row in rows} == {"4"}  # 3 subjects make 6 pairs, 4 make 12: 2 epochs of 8 in fours
    assert len({row["dice_before"] for row in rows}) == 1  # the same held-out pairs
    for row in rows:
        assert (row["trainable"] != row["parameters"]) == (row["transfer"] == "frozen")
    assert len({row["ncc"] for row in rows}) > 6  # labels of a few voxels may stay where they are
    page = (done / "study.md").read_text()
    assert "| alexnet - plain | frozen | 4 | 1 |" in page and "| frozen - scratch | plain | 3 | 1 |" in page


def test_a_study_is_held_to_its_manifest_and_a_changed_run_or_subject_is_named(
    done: Path, data: Path, tmp_path: Path
) -> None:
    told = json.loads((done / "manifest.json").read_text())
    assert len({source["sha256"] for source in told["inputs"]}) == 14  # images and labels of seven subjects
    assert {"study.csv", "effects.csv", "study.md", "2d/pretrained/alexnet.pt"} <= told["files"].keys()
    assert len([name for name in told["files"] if name.startswith("2d/runs/")]) == len(rows_of(done))
    assert verify(done, data=data).problems == {}
    mine, subjects = shutil.copytree(done, tmp_path / "out"), shutil.copytree(data, tmp_path / "data")
    run_file = next((mine / "2d" / "runs").glob("*.json"))
    run_file.write_text(run_file.read_text().replace("dice", "dice ", 1))
    save(subjects / "labels" / "s3.nii.gz", subject(0, 2)[1])
    problems = verify(mine, data=subjects).problems
    assert list(problems) == [str(run_file), f"{mine}: s3.nii.gz"] and "study, changed since" in str(problems)


def test_weights_of_imagenet_and_of_the_models_that_came_with_it_are_transfers_too(
    data: Path, overlays: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "weights" / "alexnet-owt.pth")
    kinds = ["scratch", "imagenet-frozen", "shipped-finetuned", "shipped-network"]
    backbones = ["alexnet", "plain", "vgg16_4"]
    only = {"backbone": backbones, "subjects": ["3"], "seed": ["0"], "transfer": kinds}
    study(data, tmp_path / "out", overlays=[overlays["study"]], imagenet=tmp_path / "weights", only=only)
    told = capsys.readouterr().out
    assert "left out, for there is nothing to begin from: plain, imagenet-frozen; plain, shipped-finetuned" in told
    assert "vgg16_4, shipped-network" in told
    rows = {(row["backbone"], row["transfer"]): row for row in rows_of(tmp_path / "out")}
    cut = [("vgg16_4", "scratch"), ("vgg16_4", "shipped-finetuned")]
    assert rows.keys() == {*itertools.product(["alexnet"], kinds), ("plain", "scratch"), *cut}
    assert float(rows[cut[1]]["parameters"]) == float(rows[cut[0]]["parameters"]) < 5e5
    learn = {kind: float(rows["alexnet", kind]["trainable"]) for kind in kinds}
    assert learn["imagenet-frozen"] < learn["scratch"] == learn["shipped-network"]
    dice = {kind: float(rows["alexnet", kind]["dice"]) for kind in kinds}
    assert dice["shipped-network"] > max(dice[kind] for kind in kinds[:3]) + 0.1  # after four steps
    with (tmp_path / "out" / "effects.csv").open(newline="") as stream:
        assert {row["effect"] for row in csv.DictReader(stream)} >= {f"{kind} - scratch" for kind in kinds[1:]}
    assert "alexnet, shipped-network" in (tmp_path / "out" / "study.md").read_text()


def test_no_held_out_subject_is_trained_on_and_small_sets_lie_in_large_ones(done: Path, data: Path) -> None:
    lists = {
        size: json.loads((done / "2d" / "datalists" / f"{size} subjects seed 0.json").read_text()) for size in "34"
    }
    subjects = {
        (size, part): {case[f"{side}_image"] for case in cases for side in ("fixed", "moving")}
        for size, parts in lists.items()
        for part, cases in parts.items()
    }
    assert subjects["3", "training"] < subjects["4", "training"]
    assert [len(subjects[size, "training"]) for size in "34"] == [3, 4]
    assert len(lists["3"]["training"]) == 6 and lists["3"]["validation"] == lists["4"]["validation"]
    held = list_pairs(data, split="validation", holdout=3, max_pairs=4)
    assert [case["case"] for case in lists["3"]["validation"]] == [case["case"] for case in held]
    assert not subjects["4", "training"] & subjects["4", "validation"]


def test_the_order_of_subjects_is_the_seeds() -> None:
    names = [f"s{i}" for i in range(30)]
    for seed in range(3):
        chosen = [choose(names, size, seed) for size in (5, 20, 30)]
        assert chosen[0] < chosen[1] < chosen[2] == set(names) and [len(c) for c in chosen] == [5, 20, 30]
    assert choose(names, 5, 0) != choose(names, 5, 1)


def task_of(done: Path, overlays: dict[str, Path], tmp_path: Path, name: str, **more: object) -> Task:
    """A cell of the finished study to be run again."""
    configs = [str(done / "bundle" / "configs" / "train.yaml"), str(overlays["study"])]
    listed = str(done / "2d" / "datalists" / "3 subjects seed 0.json")
    settings = {"backbone": "alexnet", "seed": 0, "dataset_dir": listed, **more}
    return Task(name, configs, settings, {}, tmp_path / f"{name}.json", tmp_path / f"{name}.pt")


def test_a_cell_run_again_gives_the_same_numbers_and_another_seed_others(
    done: Path, overlays: dict[str, Path], tmp_path: Path
) -> None:
    kept = json.loads((done / "2d" / "runs" / "alexnet scratch 3 subjects seed 0.json").read_text())
    torch.rand(7)  # whatever ran before
    again = run(task_of(done, overlays, tmp_path, "again"))["cases"]
    assert json.dumps(again) == json.dumps(kept["cases"])  # NaN is as it was
    assert run(task_of(done, overlays, tmp_path, "other", seed=1))["cases"]["ncc"] != kept["cases"]["ncc"]


def test_frozen_is_what_the_phantoms_taught_and_finetuned_begins_there(
    done: Path, overlays: dict[str, Path], tmp_path: Path
) -> None:
    source = done / "2d" / "pretrained" / "alexnet.pt"
    taught = torch.load(source, weights_only=True)
    distance = {}
    for name, more in {"frozen": {"freeze": 3}, "finetuned": {}}.items():
        run(task_of(done, overlays, tmp_path, name, pretrained=str(source), **more))
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        weights = [key for key in state if key.startswith("encoder.")]
        distance[name] = max((state[key] - taught[key]).abs().max().item() for key in weights)
    assert distance["frozen"] == 0
    assert 0 < distance["finetuned"] < 0.01  # four steps of AdamW at 0.001


def test_what_is_done_is_not_run_again(
    done: Path,
    data: Path,
    overlays: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runs, "run", lambda task: pytest.fail(f"{task.name} is run again"))
    page = study(data, done, overlays=[overlays["study"]], pretraining=overlays["pretrain"], only=GRID)
    assert page == (done / "study.md").read_text()
    assert "12 of 12 runs are done already" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished(
    data: Path,
    overlays: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only = {"backbone": ["plain"], "transfer": ["scratch"], "subjects": ["3", "all"], "seed": ["0", "1"]}
    real, asked = runs.run, []

    def interrupted(task: Task) -> dict[str, object]:
        asked.append(task.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(runs, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        study(data, tmp_path, overlays=[overlays["study"]], only=only)
    assert stop.value.code == 130 and len(rows_of(tmp_path)) == 2
    study(data, tmp_path, overlays=[overlays["study"]], only=only)
    assert len(asked) == 5 and asked[2] == asked[3] and len(rows_of(tmp_path)) == 4
    told = capsys.readouterr().out
    assert "finished runs are kept" in told and "2 of 4 runs are done already" in told and "min left" in told


def test_mistakes_are_told_before_anything_runs(
    data: Path, overlays: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run", lambda task: pytest.fail("is run"))
    given = {"data": data, "out": tmp_path / "out", "overlays": [overlays["study"]]}
    for only, message in (
        ({"backbones": ["plain"]}, "no such axis; take backbone, transfer"),
        ({"backbone": ["resnet19"]}, "backbone=resnet19: take of resnet18"),
        ({"subjects": ["1"]}, "subjects=1: take of 5, 20"),
        ({"transfer": ["frozen"]}, "--pretrain configs/pretrain.yaml"),
    ):
        with pytest.raises(InputError, match=message):
            study(**given, only=only)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must say spatial_dims"):
        study(**{**given, "overlays": []})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds 2D images"):
        study(**{**given, "overlays": [CONFIGS / "study_3d.yaml"]})  # type: ignore[arg-type]


def test_a_folder_does_not_mix_two_studies(
    done: Path, data: Path, overlays: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run", lambda task: pytest.fail("is run"))
    other = tmp_path / "other.yaml"
    other.write_text(overlays["study"].read_text() + "lncc_window: 5\n")
    with pytest.raises(InputError, match="2d: holds runs of other data or settings"):
        study(data, done, overlays=[other], pretraining=overlays["pretrain"], only=GRID)
    with pytest.raises(InputError, match="pretrained: holds weights of another --pretrain"):
        study(data, done, overlays=[overlays["study"]], pretraining=other, only=GRID)


def test_in_2d_slices_of_3d_data_are_taken(overlays: dict[str, Path], tmp_path: Path) -> None:
    only = {"backbone": ["plain"], "transfer": ["scratch"], "subjects": ["all"], "seed": ["0"]}
    page = study(cohort_of(tmp_path / "in", dims=3), tmp_path / "out", overlays=[overlays["study"]], only=only)
    assert len(list((tmp_path / "out" / "slices" / "images").iterdir())) == 7
    assert "## 2D" in page and len(rows_of(tmp_path / "out")) == 1


@pytest.mark.slow
def test_two_at_a_time_give_the_numbers_of_one_at_a_time(
    done: Path, data: Path, overlays: dict[str, Path], tmp_path: Path
) -> None:
    only = {**GRID, "transfer": ["scratch"]}
    study(data, tmp_path, overlays=[overlays["study"]], only=only, jobs=2)
    kept = [row for row in rows_of(done) if row["transfer"] == "scratch"]
    for one, two in zip(kept, rows_of(tmp_path), strict=True):
        assert float(one["ncc"]) == pytest.approx(float(two["ncc"]), abs=1e-4)
    broken = Task("broken", [str(tmp_path / "nothing.yaml")], {"seed": 0}, {}, tmp_path / "broken.json")
    with pytest.raises(Exception, match="nothing"):
        run_all([broken], 2, lambda: None)


def test_the_grid_is_the_studys() -> None:
    cells = study_module._cells(study_module._axes({}), 160)
    assert len(cells) == len({cell.name for cell in cells}) == 5 * 3 * 4 * 3
    assert {cell.subjects for cell in cells} == {5, 20, 100, 160}
    assert {cell.subjects for cell in study_module._cells(study_module._axes({}), 60)} == {5, 20, 60}

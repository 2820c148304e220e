"""A misspelt option is named, with the one that was probably meant."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from helpers.places import ROOT
from regpipe import InputError
from regpipe.engines.options import begin_command, check_numbers, check_switches, refuse_unknown, refuse_unknown_run

PROGRAM = "/somewhere/monai/bundle/__main__.py"


def command(tmp_path: Path, *options: str) -> list[str]:
    for name, text in (("a.yaml", "max_epochs: 3\nnetwork_def: {width: 2}\ntraining: []\n"), ("b.yaml", "mine: 1\n")):
        (tmp_path / name).write_text(text)
    return [PROGRAM, "run", "training", "--config_file", f"['{tmp_path}/a.yaml', '{tmp_path}/b.yaml']", *options]


def test_a_misspelt_option_is_refused_and_the_nearest_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max_epoch: no such option; did you mean --max_epochs"):
        refuse_unknown(command(tmp_path, "--max_epoch", "4"))


@pytest.mark.parametrize(
    "option", ["--max_epochs", "--mine", "--network_def#width", "--network_def::new", "--logging_file", "--max-epochs"]
)
def test_what_a_file_or_monai_knows_is_let_through(tmp_path: Path, option: str) -> None:
    refuse_unknown(command(tmp_path, option, "4"))


TRAIN = ["run", "--config_file", str(ROOT / "bundles" / "symreg_vgg16" / "configs" / "train.yaml")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train#trainr#max_epochs", "3"], r"did you mean --train#trainer\? train has"),
        (["--train::trainer::max_epoch", "3"], r"did you mean --train::trainer::max_epochs\?"),
        (["--network_def#backbon", "plain"], r"did you mean --network_def#backbone\?"),
        (["--train#handlers#9#network", "3"], "train#handlers has 0, 1"),
        (["--validate#inferer#repair", "True"], "validate#inferer is @train::inferer: give the part of that"),
        (["--run_id", "trainin"], r"^trainin: no such id to run; did you mean training\?"),
    ],
)
def test_a_misspelt_part_or_run_is_named_with_the_nearest(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        refuse_unknown([*TRAIN[1:], *words])
        refuse_unknown_run([*TRAIN[1:], *words])


@pytest.mark.parametrize(
    "words", [["--train#dataloader#pin_memory", "True"], ["--loss_weights#ncc", "1"], ["--train#handlers#0#_disabled_"]]
)
def test_a_new_part_that_its_place_may_have_is_let_through(words: list[str]) -> None:
    refuse_unknown([*TRAIN[1:], *words])


@pytest.mark.parametrize("form", ["{}/it's/a.yaml", "{}/it's/a.yaml,{}/b.yaml", '["{}/it\'s/a.yaml", "{}/b.yaml"]'])
def test_every_form_of_the_configuration_files_is_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "it's").mkdir()
    for file in ("it's/a.yaml", "b.yaml"):
        (tmp_path / file).write_text("max_epochs: 3\nrun: []\n")
    files = form.replace("{}", str(tmp_path))
    for argv in ([PROGRAM, "run", "--config_file", files], [PROGRAM, "run", f"--config_file={files}"]):
        refuse_unknown([*argv, "--max_epochs=3"])
        with pytest.raises(InputError, match="--max_epoch"):
            refuse_unknown([*argv, "--max_epoch=3"])


def test_a_switch_is_true_or_false_and_no_text() -> None:
    check_switches(resume=True, cache=False)
    with pytest.raises(InputError, match="--resume false: give True or False"):
        check_switches(resume="false")


@pytest.mark.usefixtures("restored")
def test_only_the_command_itself_has_its_options_checked_and_its_errors_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, before = command(tmp_path, "--max_epoch", "4"), sys.excepthook
    for argv in (["/bin/pytest", *wrong[1:]], [PROGRAM, "ckpt_export", *wrong[2:]]):
        monkeypatch.setattr("sys.argv", argv)
        begin_command()
    assert sys.excepthook is before
    monkeypatch.setattr("sys.argv", wrong)
    monkeypatch.setattr("threading.excepthook", threading.excepthook)
    with pytest.raises(InputError, match="--max_epochs"):
        begin_command()
    assert sys.excepthook is not before


@pytest.mark.parametrize(
    "given",
    [{"max_epochs": 0}, {"batch_size": "ten"}, {"patience": True}, {"learning_rate": -1.0}, {"max_epochs": 1.5}],
)
def test_numbers_out_of_range_are_named(given: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(given))}"):
        check_numbers(**given)


def test_a_validation_that_never_happens_is_refused() -> None:
    check_numbers(max_epochs=2, val_interval=2, learning_rate=0.1)
    with pytest.raises(InputError, match="no model would be chosen"):
        check_numbers(max_epochs=2, val_interval=5)

"""What a command says to whom: one object for machines, silence, progress, colours, exit statuses."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from helpers.bids import describe, put
from helpers.commandline import regpipe as run
from helpers.compared import RESULTS
from helpers.folders import save
from helpers.places import ROOT
from helpers.reported import write_case
from regpipe.cli import main as cli
from regpipe.phantoms.cohort import write_cohort
from regpipe.study.compare_page import write_csv
from regpipe.utils import console, versions

DOCS = ROOT / "docs" / "commandline.md"


SHIFT = """#Insight Transform File V1.0
#Transform 0
Transform: TranslationTransform_double_2_2
Parameters: 1 2
FixedParameters:
"""


def schema() -> dict[str, Any]:
    """The schema that the documentation shows."""
    return json.loads(re.findall(r"```json\n(\{.*?\n\})\n```", DOCS.read_text(), re.DOTALL)[0])


def answer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The object on stdout, which holds nothing else, and is as documented."""
    status = run(monkeypatch, *arguments)
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.validate(found, schema())
    assert found["status"] == status
    return found


def test_the_result_of_a_command_is_the_only_thing_on_stdout(monkeypatch, tmp_path, capfd) -> None:
    found = answer(monkeypatch, capfd, "--json", "phantom", tmp_path / "p", "--shape", "32,32", "--pairs", 2)
    assert found["command"] == "phantom" and found["status"] == 0 and found["error"] is None
    assert found["result"]["folder"] == str(tmp_path / "p") and found["result"]["shape"] == [32, 32]


def test_the_options_for_all_commands_may_stand_after_them(monkeypatch, tmp_path, capfd) -> None:
    arguments = ("phantom", tmp_path / "p", "--shape", "32,32", "--pairs", 1)
    assert answer(monkeypatch, capfd, *arguments, "--json", "--quiet")["result"]["pairs"] == 1
    assert run(monkeypatch, *arguments, "--", "--json") == 2  # after -- it is a file's name
    assert "{" not in capfd.readouterr().out


def test_some_cases_that_fail_are_named_beside_those_that_are_done(monkeypatch, tmp_path, capfd) -> None:
    data = write_cohort(tmp_path / "data", shape=(64, 64), n_pairs=2)
    (data / "moving_images" / "case_001.nii.gz").write_bytes(b"no image")
    for file in (data / "fixed_labels").iterdir():
        file.unlink()  # then Dice is no number
    command = (
        "--json",
        "register",
        data,
        "-o",
        tmp_path / "out",
        "--bundle",
        "none",
        "--refine",
        20,
        "--affine",
        "none",
    )
    found = answer(monkeypatch, capfd, *command)
    result = found["result"]
    assert found["status"] == 1 and found["error"] is None and result["folder"] == str(tmp_path / "out")
    assert [row["case"] for row in result["cases"]] == ["case_000"] and result["cases"][0]["dice"] is None
    assert result["cases"][0]["ncc"] > result["cases"][0]["ncc_before"]
    assert result["failures"].keys() == {"case_001"} and "case_001.nii.gz" in result["failures"]["case_001"]
    assert answer(monkeypatch, capfd, *command)["result"]["finished_before"] == 1


def test_a_mistake_and_a_misspelt_option_are_told_to_machines_too(monkeypatch, tmp_path, capfd) -> None:
    found = answer(monkeypatch, capfd, "--json", "register", tmp_path / "none", "-o", tmp_path)
    assert found["status"] == 1 and f"{tmp_path / 'none'}: no such folder" in found["error"]
    found = answer(monkeypatch, capfd, "register", "--json", "--outt", "x")
    assert found["status"] == 2 and "--outt" in found["error"]


def test_carried_files_and_those_that_could_not_be_are_listed(monkeypatch, tmp_path, capfd) -> None:
    (tmp_path / "shift.tfm").write_text(SHIFT)
    shift = tmp_path / "shift.tfm"
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("nothing")
    inputs = [tmp_path / "a.csv", tmp_path / "b.csv"]
    found = answer(monkeypatch, capfd, "--json", "apply", shift, *inputs, "-o", tmp_path / "out")
    (file,) = found["result"]["files"]
    assert found["status"] == 1 and file["output"] == str(tmp_path / "out" / "a.csv") and file["how"] == "1 points"
    assert found["result"]["problems"].keys() == {str(tmp_path / "b.csv")}
    found = answer(monkeypatch, capfd, "--json", "compose", shift, shift, "-o", tmp_path / "twice.h5")
    assert found["result"]["file"] == str(tmp_path / "twice.h5") and (tmp_path / "twice.h5").is_file()


def test_memory_is_a_table_for_machines(monkeypatch, capfd) -> None:
    monkeypatch.setattr("regpipe.cli.doctor._tasks", lambda *_: [("a small one", 2**20), ("a large one", 2**50)])
    found = answer(monkeypatch, capfd, "--json", "doctor", "--shape", "32,32", "--device", "cpu")["result"]
    small, large, _ = found["tasks"]
    assert large["peak_gib"] - small["peak_gib"] == pytest.approx(2**20 - 2**-10)
    assert small["fits"] and not large["fits"]


def test_a_report_is_told_as_its_cases_with_their_verdicts(monkeypatch, tmp_path, capfd) -> None:
    for name, dice in (("a", 0.9), ("b", 0.3)):
        write_case(tmp_path / name, name, {"dice": dice})
    result = answer(monkeypatch, capfd, "--json", "report", tmp_path)["result"]
    assert result["page"] == str(tmp_path / "report.html") and (result["fail"], result["pass"]) == (1, 1)
    assert result["cases"] == [{"case": "b", "verdict": "fail"}, {"case": "a", "verdict": "pass"}]


def test_figures_tell_every_page_that_was_made(monkeypatch, tmp_path, capfd) -> None:
    write_csv(tmp_path, RESULTS)
    (tmp_path / "study.csv").touch()
    monkeypatch.setattr("regpipe.study.page.write_page", lambda folder: "")
    result = answer(monkeypatch, capfd, "--json", "figures", tmp_path)["result"]
    assert result["pages"] == [str(tmp_path / "comparison.md"), str(tmp_path / "study.md")]


def test_a_datalist_is_told_with_its_counts(monkeypatch, tmp_path, capfd) -> None:
    root = describe(tmp_path / "set")
    for session in ("1", "2"):
        put(root, "1", session, "T1w")
    command = ("--json", "bids", root, "-o", tmp_path / "d.json", "--holdout", 0)
    result = answer(monkeypatch, capfd, *command)["result"]
    assert result == {"datalist": str(tmp_path / "d.json"), "training": 1, "validation": 0, "labels": 0}


def test_numbers_of_numpy_are_numbers_for_machines() -> None:
    with console.session(json=True):
        console.tell(count=np.int64(3), share=np.float32(0.5), none=np.float64("nan"), sure=np.bool_(True))
        assert console.told() == {"count": 3, "share": 0.5, "none": None, "sure": True}


def test_what_other_processes_and_c_print_goes_to_stderr_too(capfd) -> None:
    with console.session(json=True):
        print("python")
        subprocess.run(["echo", "process"], check=True)
    print("after")
    out, err = capfd.readouterr()
    assert out == "after\n" and "python" in err and "process" in err


def test_quiet_leaves_warnings_and_errors_only(monkeypatch, tmp_path, capfd) -> None:
    save(tmp_path / "a.nii.gz", np.zeros((16, 16), np.float32))
    with console.session(quiet=True):
        print("a result")
        subprocess.run(["echo", "a process"], check=True)
        for _ in console.Progress(range(2), what="working", unit="steps", delay=0, mininterval=0):
            pass
        assert not logging.getLogger("regpipe").isEnabledFor(logging.INFO)
        console.complain("warning", "look")
    assert capfd.readouterr() == ("", "warning: look\n")
    assert logging.getLogger("regpipe").isEnabledFor(logging.WARNING) and "TQDM_DISABLE" not in os.environ
    assert run(monkeypatch, "--quiet", "register", tmp_path / "none", "-o", tmp_path) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


# ------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(console, "DELAY", 0.0)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    yield


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **given: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in console.Progress(range(4), what="registering", unit="pairs", **given):
        pass
    return stream.getvalue()


@pytest.mark.usefixtures("at_once")
def test_into_a_file_progress_is_plain_lines_with_the_time_left(monkeypatch) -> None:
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n") and "\n\n" not in text
    lines = text.splitlines()
    assert len(lines) == 5 and all(
        re.fullmatch(r"registering: \d of 4 pairs, .* gone, .* left", line) for line in lines
    )


@pytest.mark.usefixtures("at_once")
def test_on_a_terminal_progress_is_a_bar_that_goes_away(monkeypatch) -> None:
    text = shown(monkeypatch, Terminal(), mininterval=0, ncols=90)
    assert "\r" in text and "registering  75%" in text and "3/4" in text and " left]" in text
    assert text.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # written over with blanks


def test_what_is_quick_shows_no_progress_and_lines_are_sparse(monkeypatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == "" and shown(monkeypatch, Terminal()) == ""
    monkeypatch.setattr(console, "DELAY", 0.0)
    assert len(shown(monkeypatch, io.StringIO()).splitlines()) == 1


@pytest.mark.usefixtures("at_once")
def test_of_several_processes_the_first_one_shows_progress(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(monkeypatch, io.StringIO()) == ""
    monkeypatch.setenv("RANK", "0")
    assert shown(monkeypatch, io.StringIO()) != ""


@pytest.mark.usefixtures("at_once")
def test_everything_that_takes_long_shows_progress(monkeypatch, tmp_path, capfd) -> None:
    data = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=2)
    assert "writing phantoms: 2 of 2 pairs" in capfd.readouterr().err
    command = ("register", data, "-o", tmp_path / "out", "--bundle", "none")
    assert run(monkeypatch, *command, "--refine", 4, "--affine", "rigid") == 0
    err = capfd.readouterr().err
    for words in ("registering: 1 of 2 pairs", "aligning: 100 %", "optimising: 100 %"):
        assert words in err, words


# ------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("stream", "environment", "colours"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),  # no-color.org: when present and not empty
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, stream, environment, colours) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream.truncate(0)
    stream.seek(0)
    monkeypatch.setattr(sys, "stderr", stream)
    console.complain("error", "it is so")
    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert plain == "error: it is so\n" and ("\x1b" in stream.getvalue()) == colours


# ------------------------------------------------------------------------------------- exit statuses


def test_a_stop_by_the_keyboard_is_130_and_a_bug_is_told_with_what_to_do(monkeypatch, tmp_path, capfd) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("regpipe.phantoms.cohort.write_cohort", stopped)
    assert run(monkeypatch, "phantom", tmp_path / "p") == 130
    monkeypatch.setattr("regpipe.phantoms.cohort.write_cohort", broken)
    assert run(monkeypatch, "phantom", tmp_path / "p") == 1
    err = capfd.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: by nothing; this should not happen" in err


# ------------------------------------------------------------------------------------- versions, help


def test_versions_come_without_loading_anything_heavy(monkeypatch, capfd) -> None:
    found = answer(monkeypatch, capfd, "--json", "--version")["result"]
    import torch

    assert found["torch"] == torch.__version__.partition("+")[0] and found["cuda"] == torch.version.cuda
    assert found["regpipe"] == "0.1.0" and found["python"] == sys.version.split()[0]
    assert versions.versions().keys() >= {"torchvision", "monai", "pytorch-ignite", "itk"}
    assert run(monkeypatch, "--version") == 0 and f"torch {found['torch']}\n" in capfd.readouterr().out


def test_a_package_that_is_missing_is_said_to_be(monkeypatch, capfd) -> None:
    monkeypatch.setattr(versions, "PACKAGES", ("regpipe", "no-such-package"))
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    assert run(monkeypatch, "--version") == 0
    assert "no-such-package is missing\ncuda is missing" in capfd.readouterr().out


def test_help_completion_and_versions_load_no_heavy_module() -> None:
    heavy = ["torch", "monai", "itk", "nibabel", "scipy", "matplotlib", "pandas", "bids", "mlflow"]
    code = f"import sys; import regpipe.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------- documentation


def test_every_command_is_documented_with_what_it_tells() -> None:
    text = DOCS.read_text()
    commands = {
        callback.__name__ for callback in (command.callback for command in cli.app.registered_commands) if callback
    }
    assert commands and all(f"| `{name}` |" in text for name in commands)

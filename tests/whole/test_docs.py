"""The documentation held to the program: commands run or are at least known, snippets hold, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from markdown.extensions.toc import slugify
from PIL import Image as Picture

from helpers import docpages
from helpers.bundles import Command
from helpers.docpages import PAGES, blocks
from helpers.inprocess import as_if_in_its_own_process
from helpers.places import ROOT
from helpers.registries import restored
from regpipe.cli import main as cli
from regpipe.phantoms.cohort import write_cohort

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
RUN = [page for page in PAGES if any(block.runs for block in blocks(page.read_text(encoding="utf-8"), "bash"))]
Words = list[str]


@pytest.mark.parametrize("page", PAGES, ids=docpages.name)
def test_every_command_of_a_page_is_one_that_the_program_knows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "bash"):
        for command in docpages.commands(block.text):
            docpages.check(command)
    known = docpages.known_options()
    for span in docpages.inline(text):
        words = span.split(" ")
        if words[:3] == ["python", "-m", "monai.bundle"]:
            docpages.check(docpages.commands(span)[0])
        options = [word for word in words if re.fullmatch(r"--[a-z][\w-]*", word)]
        if words[0] == "regpipe" or words[0].startswith("--"):
            assert set(options) <= known, f"{span}: {set(options) - known}"


UNKNOWN = {
    "program": "regpip register a b -o c",
    "command": "regpipe registre a b -o c",
    "option": "regpipe register a b --otu c",
    "missing option": "regpipe register a b",
    "id of a comparison": "regpipe compare DATA -o OUT --set max_epoch=3",
    "overlay": "regpipe compare DATA -o OUT --overlay configs/none.yaml",
    "id of a run": "python -m monai.bundle run training --config_file configs/train.yaml --max_epoch 3",
    "run": "python -m monai.bundle run trainin --config_file configs/train.yaml",
    "configuration": "python -m monai.bundle run training --config_file configs/trian.yaml",
    "option of MONAI's": "python -m monai.bundle verify_metadata --metafile configs/metadata.json",
    "script": "python tests/benchmarks/none.py",
    "target": "make demonstration",
    "behind torchrun": "torchrun --nproc_per_node=2 --no-python regpipe registre a b -o c",
    "module behind torchrun": "torchrun -m monai.bundle run trainin --config_file configs/train.yaml",
}


@pytest.mark.parametrize("mistake", UNKNOWN)
def test_a_mistake_in_a_page_would_be_found(mistake: str) -> None:
    (command,) = docpages.commands(UNKNOWN[mistake])
    with pytest.raises(Exception, match=r"no such|No such|no option|no program|not in|Missing parameter"):
        docpages.check(command)


@pytest.mark.parametrize("page", PAGES, ids=docpages.name)
def test_no_command_hides_in_an_indented_block(page: Path) -> None:
    outside = docpages.FENCE.sub("", page.read_text(encoding="utf-8"))
    assert re.findall(r"^(?: {4}|\t)\s*(?:regpipe|python3?|make|torchrun|pip) .*", outside, re.MULTILINE) == []


def anchors(page: Path) -> set[str]:
    text = docpages.FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=docpages.name)
def test_every_link_within_the_repository_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = docpages.FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(docpages.CODE.sub("", text)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=docpages.name)
def test_every_python_snippet_holds(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # snippets write files
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        code = compile(block.text, docpages.name(page), "exec")
        if block.runs:
            with restored():
                exec(code, {})


def test_the_notebook_is_committed_without_outputs_and_its_commands_are_known() -> None:
    cells = [c for c in json.loads(docpages.NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert cells and all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    lines = [line.lstrip("!") for cell in docpages.notebook_cells("code") for line in cell.splitlines()]
    told = [line for line in lines if line.startswith("regpipe ")]
    assert len(told) > 3
    for command in docpages.commands("\n".join(told)):
        docpages.check(command)


# ------------------------------------------------------------------- the pages' commands, run on little data


def smaller(command: Words) -> Words:
    """The command with fewer and smaller images and steps; later options win."""
    rest = ["landmarks" if word == "both" else word for word in command[1:]]  # elastix takes seconds
    command = [command[0], *rest]
    if rest[:1] == ["phantom"]:
        return [*command, "--pairs", "4", "--shape", "32,32"]
    if rest[:1] == ["compare"]:
        few = [f"--set={name}" for name in ("max_epochs=1", "pairs_per_epoch=2", "max_val_pairs=1", "val_interval=1")]
        few += ["--set=grid_spacing=[1.0,1.0,1.0]"] if "configs/prostate_mrus.yaml" in command else []
        return [*command, *few, *([] if "--backbones" in command else ["--backbones", "alexnet"])]
    if rest[:1] == ["register"]:
        stage = [] if {"--bundle", "--affine", "--affine-from"} & set(command) else ["--affine", "centre"]
        return [*command, *stage, *([] if "--bundle" in command and "--refine" not in command else ["--refine", "2"])]
    if "training" in rest:
        few = ["--max_epochs", "1", "--pairs_per_epoch", "2", "--max_val_pairs", "1"]
        return [*command, *few, *(["--phantom_pairs", "4"] if "pretrain.yaml" in str(command) else [])]
    return command


class Shell:
    """The lines of a page, each in this process: a process of its own would take seconds to begin."""

    def __init__(self, monai_bundle: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundle, self.patch = monai_bundle, monkeypatch

    def run(self, command: Words) -> None:
        known: dict[str, Callable[..., object]] = {"regpipe": self.regpipe, "python": self.python}
        known |= {"cd": self.patch.chdir, "cp": self.copy}
        words = smaller(command)
        if words[:2] == ["regpipe", "dashboard"]:
            return self.dashboard(*words[2:])
        known[words[0]](*words[1:])

    def regpipe(self, *arguments: str) -> None:
        assert not arguments[0].startswith("-"), f"regpipe {arguments[0]}: mark the block as not run in CI"
        self.patch.setattr("sys.argv", ["regpipe", *arguments])
        with as_if_in_its_own_process(), pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, arguments

    def python(self, *arguments: str) -> None:
        assert arguments[:2] == ("-m", "monai.bundle")
        self.bundle(*arguments[2:])

    def copy(self, option: str, source: str, target: str) -> None:
        assert option == "-r"
        shutil.copytree(source, target)

    def dashboard(self, folder: str) -> None:
        """It would stay until Ctrl-C: there is something to show."""
        assert list(Path(folder).rglob("events.out.tfevents.*"))


def in_this_process(shell: Shell) -> Callable[[Words], subprocess.CompletedProcess[str]]:
    """For ``regpipe compare``, which gives each backbone processes of its own."""

    def run(command: Words) -> subprocess.CompletedProcess[str]:
        shell.bundle(*command[command.index("monai.bundle") + 1 :])
        return subprocess.CompletedProcess(command, 0)

    return run


def pair_2d(folder: Path) -> None:
    """``fixed.nii.gz``, ``moving.nii.gz`` and points in both."""
    cohort = write_cohort(folder / "DATA", shape=(32, 32), n_pairs=5)
    write_cohort(folder / "NEW", shape=(32, 32), n_pairs=1, seed=1)
    for side in ("fixed", "moving"):
        shutil.copy(cohort / f"{side}_images" / "case_000.nii.gz", folder / f"{side}.nii.gz")
    shutil.copy(cohort / "moving_landmarks" / "case_000.csv", folder / "targets.csv")


def pair_3d(folder: Path, names: dict[str, str]) -> Path:
    """A pair, its points and masks by the names that a page gives them."""
    cohort = write_cohort(folder / "DATA", kind="mr", shape=(24, 24, 24), n_pairs=3)
    for side, its_name in names.items():
        shutil.copy(cohort / f"{side}_images" / "case_000.nii.gz", folder / f"{its_name}.nii.gz")
        shutil.copy(cohort / f"{side}_landmarks" / "case_000.csv", folder / f"{its_name}.csv")
        mask = nib.Nifti1Image(np.ones((24, 24, 24), np.uint8), np.diag([-1.0, -1.0, 1.0, 1.0]))
        nib.save(mask, folder / f"{its_name}_lung.nii.gz")
        nib.save(mask, folder / "fan.nii.gz")
    return cohort


def prostate(folder: Path) -> None:
    """Labels with a structure per channel: the gland, then landmarks."""
    cohort = pair_3d(folder, {"fixed": "us", "moving": "mr"})
    for path in cohort.glob("*_labels/*"):
        label = nib.Nifti1Image.from_filename(path)
        values = np.asarray(label.dataobj)
        channels = np.stack([values > 0, *(values == i for i in np.unique(values)[1:3])], -1).astype(np.uint8)
        nib.save(nib.Nifti1Image(channels, label.affine), path)
    for folder_of_points in cohort.glob("*_landmarks"):
        shutil.rmtree(folder_of_points)
    shutil.copytree(cohort, folder / "NEW")


def frames(folder: Path) -> None:
    cohort = write_cohort(folder / "cohort", shape=(32, 32), n_pairs=5)
    (folder / "FRAMES").mkdir()
    for i, path in enumerate(sorted((cohort / "fixed_images").iterdir())):
        pixels = (255 * np.asarray(nib.Nifti1Image.from_filename(path).dataobj)).astype(np.uint8)
        Picture.fromarray(pixels.T).save(folder / "FRAMES" / f"frame_{i + 1:04d}.png")
    (folder / "vessel.csv").write_text("x,y\n12,14\n20,9\n")


STANDINS: dict[str, Callable[[Path], object]] = {
    "docs/howto/mr_ultrasound.md": prostate,
    "docs/howto/lung_ct.md": lambda folder: pair_3d(folder, {"fixed": "baseline", "moving": "followup"}),
    "docs/howto/ultrasound_sequence.md": frames,
    "docs/start.md": lambda folder: None,  # makes its own
}


@pytest.mark.parametrize("page", RUN, ids=docpages.name)
def test_the_commands_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monai_bundle: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("configs", "bundles"):
        os.symlink(ROOT / part, tmp_path / part)
    STANDINS.get(docpages.name(page), pair_2d)(tmp_path)
    shell = Shell(monai_bundle, monkeypatch)
    monkeypatch.setattr("regpipe.study.compare.subprocess.run", in_this_process(shell))
    monkeypatch.chdir(tmp_path)
    if page.is_relative_to(docpages.BUNDLE):  # its commands are given inside it
        shutil.copytree(ROOT / "bundles" / "symreg_alexnet" / "configs", tmp_path / "inside" / "configs")
        for data in ("DATA", "NEW"):
            (tmp_path / data).rename(tmp_path / "inside" / data)
        monkeypatch.chdir(tmp_path / "inside")
    for block in blocks(page.read_text(encoding="utf-8"), "bash"):
        for command in docpages.commands(block.text) if block.runs else []:
            shell.run(command)

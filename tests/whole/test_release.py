"""A version is one everywhere, and what publishes it names only what is there."""

from __future__ import annotations

import re

import pytest
import yaml

from helpers import release
from helpers.places import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_all_files_say_the_same_version() -> None:
    assert len(set(release.versions().values())) == 1, release.versions()


def test_a_version_without_a_dated_entry_in_the_changelog_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    (version,) = set(release.versions().values())
    text = release.read("docs/changelog.md")
    assert re.search(rf"^## \[(Unreleased\]: )?{re.escape(version)}\b", text, re.MULTILINE)
    texts = {"docs/changelog.md": f"# Changelog\n\n## [{version}] - 2026-01-31\n"}
    read = release.read
    monkeypatch.setattr(release, "read", lambda name: texts.get(name) or read(name))
    assert release.problems(version) == []
    assert len(release.problems("9.9.9")) == len(release.versions()) + 1
    texts["docs/changelog.md"] = f"## [Unreleased]: {version}\n"
    assert release.problems(version) == [f"docs/changelog.md has no line '## [{version}] - YEAR-MONTH-DAY'"]


def test_the_packages_of_a_bundle_are_each_of_one_version() -> None:
    lines = release.requirements()
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)+", line) for line in lines)
    assert {"monai", "torch", "numpy", "regpipe", "torchvision"} <= {line.partition("==")[0] for line in lines}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_scripts_and_targets_that_exist(path) -> None:
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert lines
    for line in lines:
        program, *words = line.split()
        if program == "make":
            assert set(words) <= targets
        else:
            assert program in ("bash", "python") and (ROOT / words[0]).is_file()


def test_both_workflows_begin_with_what_must_pass_anywhere() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]
    for path in WORKFLOWS:
        assert "bash .ci/run" in path.read_text()
    release_yml = yaml.safe_load(WORKFLOWS[1].read_text())
    assert release_yml[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads on as true
    assert {job.get("needs") for name, job in release_yml["jobs"].items() if name != "check"} == {"check"}

"""Whose configuration runs: regpipe's own always, a changed or foreign one only with --trust."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.bundles import deforming_bundle
from helpers.commandline import regpipe
from helpers.places import ROOT
from regpipe.bundle.own import difference, require_own
from regpipe.bundle.run import bundle_in
from regpipe.bundle.write import rendered, write_bundle
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.networks.encoders import BACKBONES
from regpipe.phantoms.cohort import write_cohort
from regpipe.study.compare import compare
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

CONFIGS = ("inference.yaml",)
BUNDLES = ROOT / "bundles"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deforming_bundle(tmp_path_factory.mktemp("model") / "bundle", Grid((32, 32), (1.0, 1.0)))


@pytest.fixture
def bundle(tmp_path: Path, trained: Path) -> Path:
    """To be changed."""
    return Path(shutil.copytree(trained, tmp_path / "bundle"))


def append(bundle: Path, name: str, text: str) -> None:
    with (bundle / name).open("a") as file:
        file.write(text)


def test_bundles_as_they_are_written_and_copied_are_trusted(tmp_path: Path) -> None:
    for backbone in BACKBONES:
        every = ("train.yaml", "evaluate.yaml", "inference.yaml", "multi_gpu.yaml")
        assert difference(write_bundle(backbone, tmp_path / backbone), every) is None
    for bundle in BUNDLES.iterdir():
        assert difference(bundle, CONFIGS) is None


def test_what_a_user_may_change_needs_no_trust(bundle: Path) -> None:
    (bundle / "docs" / "README.md").write_text("my model")
    (bundle / "configs" / "mine.yaml").write_text("a: $print()")  # not run unless it is named
    append(bundle, "configs/train.yaml", "\n# not run by register")
    metadata = bundle / "configs" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "name": "mine, 5 % better", "version": "2.0"}))
    config = bundle / "configs" / "inference.yaml"
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))  # as git may check it out
    assert difference(bundle, CONFIGS) is None


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a line more": (
        lambda b: append(b, "configs/inference.yaml", "more: 1\n"),
        r"inference.yaml: .* from line \d\d+ on",
    ),
    "logging": (lambda b: append(b, "configs/logging.conf", "[x]\n"), "logging.conf: is not as this version"),
    "another backbone": (
        lambda b: (b / "configs/inference.yaml").write_text(
            rendered("configs/inference.yaml", "vgg16").replace("backbone: vgg16", "backbone: evil")
        ),
        "inference.yaml: is not as this version of regpipe writes it, from line",
    ),
    "metadata": (
        lambda b: (b / "configs/metadata.json").write_text('{"a": [{"b": "$import antigravity"}]}'),
        "metadata.json: holds an expression",
    ),
    "metadata's macro": (
        lambda b: (b / "configs/metadata.json").write_text('{"a": "\\u0025other.yaml"}'),
        "metadata.json: holds an expression",
    ),
    "a module": (lambda b: (b / "h5py.py").write_text("raise SystemExit"), "bundle: holds Python code, h5py.py"),
    "a module of a package without __init__": (
        lambda b: replace_file(b / "models" / "hooks" / "extra.py", b""),
        "bundle: holds Python code, extra.py",
    ),
    "lines that end otherwise": (
        lambda b: (b / "configs/logging.conf").write_text(
            (b / "configs/logging.conf").read_text().replace("\n", "\x0b", 1)
        ),
        "logging.conf: is not as this version",
    ),
    "a package": (
        lambda b: shutil.copytree(Path(json.__file__).parent, b / "scripts"),
        "holds Python code, __init__.py",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_could_run_is_refused_by_name_and_run_when_it_is_trusted(bundle: Path, change: str) -> None:
    make, said = CHANGES[change]
    make(bundle)
    with pytest.raises(InputError, match=f"{said}.*--trust"):
        require_own(bundle, CONFIGS)
    require_own(bundle, CONFIGS, trust=True)


def test_links_that_lead_back_are_gone_round(bundle: Path) -> None:
    for name in ("a", "b", "c"):
        (bundle / "models" / name).symlink_to(bundle)
    assert difference(bundle, CONFIGS) is None


def test_register_runs_nothing_of_a_foreign_bundle_unless_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, data = tmp_path / "mark", write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=1)
    append(bundle, "configs/inference.yaml", f"\nextra: $__import__('pathlib').Path('{mark}').touch()\n")
    config = bundle / "configs" / "inference.yaml"
    config.write_text(config.read_text().replace("initialize:\n", "initialize:\n- '@extra'\n"))
    command = ["register", data, "--bundle", bundle, "-o", tmp_path / "out"]
    assert regpipe(monkeypatch, *command) == 1
    assert "inference.yaml: is not as this version of regpipe writes it, from line" in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert regpipe(monkeypatch, *command, "--trust") == 0
    assert mark.exists() and len(read_rows(tmp_path / "out" / "metrics.csv")) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks into the current folder")
def test_what_regpipe_starts_imports_nothing_from_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "planted.py").touch()
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # brought back, and empty: not asked for
    monkeypatch.delenv("PYTHONSAFEPATH")
    command = [sys.executable, "-c", "import planted"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert regpipe(monkeypatch, "phantom", tmp_path / "data", "--pairs", 1, "--shape", "16,16") == 0
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


def test_names_of_folders_are_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "$open('mark', 'w')"
    write_cohort(name, shape=(32, 32), n_pairs=1)
    shutil.copytree(trained, "%bundle")
    assert regpipe(monkeypatch, "register", name, "--bundle", "%bundle", "-o", "$open('mark', 'w').name") == 0
    assert not (tmp_path / "mark").exists() and (tmp_path / "$open('mark', 'w').name" / "metrics.csv").is_file()


def test_compare_runs_nothing_of_a_foreign_bundle_that_lies_in_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    append(write_bundle("alexnet", tmp_path / "alexnet"), "configs/evaluate.yaml", "\nmore: 1\n")
    monkeypatch.setattr("regpipe.study.compare.run_bundle", lambda *_, **__: pytest.fail("was run"))
    with pytest.raises(InputError, match="alexnet/configs/evaluate.yaml: is not as this version.*--trust"):
        compare(tmp_path, backbones=["alexnet"])


def test_the_best_of_a_comparison_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("../../elsewhere\n")
    assert bundle_in(tmp_path) == tmp_path / "elsewhere"

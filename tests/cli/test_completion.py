"""What the shell is offered for a word that is not finished."""

from __future__ import annotations

import pytest

from helpers.commandline import regpipe as run
from regpipe.cli import completion


def completed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    monkeypatch.setenv("_REGPIPE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    run(monkeypatch)
    return capfd.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("regpipe phantom p --kind ", list(completion.PHANTOMS)),
        ("regpipe phantom p --kind s", ["synthetic"]),
        ("regpipe doctor --backbone ", list(completion.BACKBONES)),
        ("regpipe compare --backbones resnet18,v", ["resnet18,vgg16"]),
        ("regpipe register a b --formats itk,", ["itk," + name for name in completion.FORMATS if name != "itk"]),
        ("regpipe register a b --similarity m", ["mind", "mi", "mse"]),
        ("regpipe register a b --affine ri", ["rigid"]),
        ("regpipe register a b --affine-from l", ["landmarks"]),
        ("regpipe register a b --affine-metric ", ["mi", "ncc"]),
        ("regpipe register a --pairing ", ["all", "first"]),
        ("regpipe apply c f --interpolation l", ["linear", "label"]),
        ("regpipe apply c f --to m", ["moving"]),
        ("regpipe bids b --pairing s", ["sessions", "subjects"]),
        ("regpipe com", ["compose", "compare"]),
    ],
)
def test_the_shell_completes(line: str, offered: list[str], monkeypatch, capfd) -> None:
    assert completed(monkeypatch, capfd, line) == offered


def test_what_is_completed_is_what_the_commands_know() -> None:
    from regpipe.data import bids
    from regpipe.inference import case_files
    from regpipe.losses.terms import TERMS
    from regpipe.networks import encoders
    from regpipe.phantoms import cohort, scenes
    from regpipe.transforms import affine, apply, export, resample
    from regpipe.utils import settings

    assert tuple(encoders.BACKBONES) == completion.BACKBONES
    assert (*scenes.KINDS, cohort.SYNTHETIC) == completion.PHANTOMS
    assert (*affine.STAGES, "projective") == completion.STAGES and tuple(affine.METRICS) == settings.METRICS
    assert tuple(name for name, term in TERMS.items() if term.weight is not None) == completion.SIMILARITIES
    assert (case_files.DENSE, *export.FORMATS) == completion.FORMATS
    assert completion.INTERPOLATIONS == resample.INTERPOLATIONS == apply.INTERPOLATIONS
    assert completion.BIDS_PAIRINGS == bids.PAIRINGS

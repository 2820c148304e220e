"""The pages of the documentation as data: their blocks, their commands, and whether the program knows these."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import monai.bundle
import typer.main
from monai.bundle import ConfigParser

from helpers.places import ROOT
from regpipe.cli import main as cli
from regpipe.engines.options import MONAI, refuse_unknown_ids

BUNDLE = ROOT / "bundles" / "symreg_resnet18"
PAGES = [ROOT / "README.md", BUNDLE / "docs" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
# The one convention: "not run in CI: REASON", in a block for the block, in the text for the whole page.
NOT_RUN = re.compile(r"not run in CI: \S+")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PIPED = re.compile(r"\s+(?:\||\d?>)\s?")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OTHER_PROGRAMS = (
    "cd",
    "cp",
    "git",
    "mkdir",
    "pip",
    "python3",
    "mlflow",
    "sbatch",
    "source",
    "tensorboard",
    "antsApplyTransforms",
)
DEVELOPERS = (".ci/run", ".venv/bin/python")
# options that pages name alone and that are other programs' or a benchmark's
OTHER_OPTIONS = ("--nnodes", "--nproc_per_node", "--requeue", "--bundle_root", "--profile", "--id", "--help")
TRACKING_OPTIONS = ("--tracking_uri", "--experiment_name", "--run_name", "--save_execute_config")


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    runs: bool  # says nothing of not being run


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[Block]:
    """The blocks of one language, in order."""
    outside = FENCE.sub("", text)
    whole = not NOT_RUN.search(outside)
    found = [Block(kind, inner, whole and not NOT_RUN.search(inner)) for kind, inner in FENCE.findall(text)]
    return [block for block in found if block.language == language]


def commands(text: str) -> list[list[str]]:
    """The commands of a block as lists of words: lines joined at a backslash, without comments and what is piped on."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    kept = [PIPED.split(part)[0] for line in lines for part in line.split(" && ")]
    words = [shlex.split(part, comments=True) for part in kept]
    return [[word for word in command if word != "..."] for command in words if command]


def inline(text: str) -> Iterator[str]:
    """Code within sentences."""
    yield from (re.sub(r"\s+", " ", span) for span in CODE.findall(FENCE.sub("", text)))


def notebook_cells(kind: str) -> list[str]:
    """The sources of the notebook's cells of a kind: ``code`` or ``markdown``."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def check(command: Sequence[str]) -> None:
    """Raises whatever is wrong with a command: no such program, subcommand, option, id, run or file."""
    program, *rest = command
    if program == "torchrun":
        start = rest.index("--no-python") + 1 if "--no-python" in rest else rest.index("-m") - 1
        program, *rest = rest[start:] if "--no-python" in rest else ["python", *rest[start + 1 :]]
    if "=" in program:  # a variable of the environment before the command
        check(rest)
    elif program == "regpipe":
        check_regpipe(rest)
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "make":
        check_make(rest)
    elif program not in (*OTHER_PROGRAMS, *DEVELOPERS):
        raise ValueError(f"{program}: no program that pages use")


def check_regpipe(arguments: Sequence[str]) -> None:
    """Parse as the program would, and look up what ``--set`` and ``--overlay`` name."""
    if arguments[0].startswith("-"):
        return  # --help, --version
    group: Any = typer.main.get_command(cli.app)
    everywhere = {option for parameter in group.params for option in parameter.opts}
    words = [word.strip("[]") for word in arguments if word not in everywhere]
    command = group.commands.get(words[0])
    if command is None:
        raise ValueError(f"regpipe {words[0]}: no such command")
    context = command.make_context(words[0], list(words[1:]))  # raises for an unknown option; nothing runs
    overlays = context.params.get("overlay") or []
    files = [str(configuration(str(file))) for file in overlays]
    ids = [setting.partition("=")[0] for setting in context.params.get("set_") or []]
    refuse_unknown_ids(ids, [str(BUNDLE / "configs" / "train.yaml"), *files])


def check_python(arguments: Sequence[str]) -> None:
    """``-m monai.bundle COMMAND``, or a script of the repository."""
    if arguments[:2] == ["-m", "monai.bundle"]:
        check_bundle(arguments[2:])
    elif arguments[0] != "-m" and not (ROOT / arguments[0]).is_file():
        raise ValueError(f"{arguments[0]}: no such script")


def check_make(targets: Sequence[str]) -> None:
    """Targets of the Makefile."""
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if not targets or not set(targets) <= set(known):
        raise ValueError(f"make {' '.join(targets)}: no such target")


def check_bundle(arguments: Sequence[str]) -> None:
    """``run`` against the ids of its configuration files, other commands against their own arguments."""
    command, *rest = arguments
    given = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
    if command != "run":
        unknown = set(given) - set(inspect.signature(getattr(monai.bundle, command)).parameters)
        if unknown:
            raise ValueError(f"monai.bundle {command}: no option {unknown}")
        return
    files = config_files(rest)
    refuse_unknown_ids(given, files, also=MONAI)
    runs = [word for word in rest[:1] if not word.startswith("--")]
    known = set().union(*(ConfigParser.load_config_file(file) for file in files))
    if not set(runs) <= known:
        raise ValueError(f"monai.bundle run {runs[0]}: not in {files}")


def config_files(arguments: Sequence[str]) -> list[str]:
    """Where the files of ``--config_file`` are in this repository."""
    given = arguments[arguments.index("--config_file") + 1]
    files = ast.literal_eval(given) if given.startswith("[") else [given]
    return [str(configuration(file)) for file in files]


def configuration(file: str) -> Path:
    """A bundle's own configuration or an overlay of ``configs/``."""
    for folder in (BUNDLE / "configs", ROOT / "configs"):
        if (folder / Path(file).name).is_file():
            return folder / Path(file).name
    raise ValueError(f"{file}: no such configuration")


def known_options() -> set[str]:
    """Every option that a page may name by itself: of any command, or an id of a bundle's configuration."""
    group: Any = typer.main.get_command(cli.app)
    options = {o for command in (group, *group.commands.values()) for p in command.params for o in p.opts}
    files = [*(BUNDLE / "configs").glob("*.yaml"), *(ROOT / "configs").glob("*.yaml")]
    ids = {re.split("::|#", key.lstrip("+"))[0] for file in files for key in ConfigParser.load_config_file(str(file))}
    functions = (monai.bundle.ckpt_export, monai.bundle.verify_metadata, monai.bundle.run)
    ids |= {parameter for function in functions for parameter in inspect.signature(function).parameters}
    return options | {f"--{identifier}" for identifier in ids} | {*OTHER_OPTIONS, *TRACKING_OPTIONS}

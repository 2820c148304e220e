"""Checks the command line of a bundle: MONAI silently takes a misspelt option for a new id."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

from regpipe.utils.errors import InputError, one_line_errors
from regpipe.utils.versions import refuse_old

MONAI = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")


def begin_command() -> None:
    """Prepare a process of ``python -m monai.bundle run``: errors end it with one line, misspelt options and packages
    that are too old are refused.

    In any other program it does nothing. MONAI keeps no record of what was given, so ``sys.argv`` is read.

    Raises:
        InputError: as ``refuse_unknown`` and ``utils.versions.refuse_old``.
    """
    command = [sys.argv[0], *sys.argv[1:2]]
    if Path(command[0]).parts[-3:] == ("monai", "bundle", "__main__.py") and command[1:] == ["run"]:
        one_line_errors()
        refuse_old()
        refuse_unknown(sys.argv[2:])
        refuse_unknown_run(sys.argv[2:])


def refuse_unknown(words: Sequence[str]) -> None:
    """Check what follows ``python -m monai.bundle run`` against the ids of its configuration files.

    Raises:
        InputError: an option that no file knows; the nearest one is named. ``--tracking`` without its package.
    """
    argv = [part for arg in words for part in arg.split("=", 1 if arg[:2] == "--" else 0)]
    if "--config_file" not in argv:
        return
    files = _files(argv[argv.index("--config_file") + 1])
    also = (*MONAI, *_tracking_ids(argv))
    refuse_unknown_ids([arg[2:].replace("-", "_") for arg in argv if arg.startswith("--")], files, also=also)


def refuse_unknown_run(words: Sequence[str]) -> None:
    """Check the id that is to be run, by default ``run``; MONAI looks it up only after everything is prepared.

    Raises:
        InputError: as ``refuse_unknown``.
    """
    argv = [part for arg in words for part in (arg.split("=", 1) if arg[:2] == "--" else [arg])]
    if "--config_file" in argv:
        named = argv[argv.index("--run_id") + 1 :] if "--run_id" in argv else argv
        wanted = named[0] if named and not named[0].startswith("--") else "run"
        refuse_unknown_ids([wanted], _files(argv[argv.index("--config_file") + 1]), option="")


def refuse_unknown_ids(
    names: Iterable[str], files: Sequence[str], *, also: Iterable[str] = (), option: str = "--"
) -> None:
    """Check names of settings, ``id`` or ``id#part``, against the ids of configuration files.

    A new part is accepted where a dictionary, or the parameters of its ``_target_``, may have it.

    Raises:
        InputError: a name that no file knows; the nearest one is named.
    """
    from monai.bundle import ConfigParser  # MONAI takes seconds to import

    known = ConfigParser.load_config_files(list(files))
    for name in names:
        first, *parts = re.split("::|#", name.lstrip("+"))
        tops = {key.split("::")[0].split("#")[0].lstrip("+") for key in (*also, *known)}
        if first not in tops:
            _refuse(name, first, tops, f"known are the ids of {', '.join(files)}", option)
        place, seen = known.get(first), first
        for i, part in enumerate(parts):
            if isinstance(place, str) and place.startswith("@"):
                raise InputError(f"--{name}: {seen} is {place}: give the part of that")
            inner = dict(enumerate(place)) if isinstance(place, list) else place
            held = {str(key): value for key, value in inner.items()} if isinstance(inner, dict) else {}
            if part not in held and (i < len(parts) - 1 or not _may_have(inner, part, first)):
                _refuse(name, part, held, f"{seen} has {', '.join(sorted(held)) or 'no parts'}", option)
            place = held.get(part)
            seen = f"{seen}#{part}"


def _refuse(name: str, part: str, known: Iterable[str], where: str, option: str) -> NoReturn:
    near = difflib.get_close_matches(part, sorted(known), 1)
    meant = f"; did you mean {option}{name[: name.rindex(part)]}{near[0]}?" if near else ";"
    raise InputError(f"{option}{name}: no such {'option' if option else 'id to run'}{meant} {where}")


def _may_have(place: Any, part: str, top: str) -> bool:
    """Whether a place in a configuration may get a new part of this name."""
    if not isinstance(place, dict) or top in ("train", "validate") and "_target_" not in place:
        return False
    if "_target_" not in place or part.startswith("_"):
        return True
    made = locate(str(place["_target_"]))
    try:
        parameters = inspect.signature(made).parameters  # type: ignore[arg-type]  # refused there
    except (TypeError, ValueError):  # MONAI's short names, expressions, what says nothing of itself
        return True
    return part in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _tracking_ids(argv: Sequence[str]) -> list[str]:
    """The ids that ``--tracking`` brings: ``experiment_name``, ``run_name`` ...

    Raises:
        InputError: MLflow is not installed.
    """
    if "--tracking" not in argv:
        return []
    from monai.bundle import ConfigParser
    from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

    name = argv[argv.index("--tracking") + 1]
    if name == "mlflow" and find_spec("mlflow") is None:
        raise InputError('--tracking mlflow: needs MLflow; pip install "regpipe[mlflow]"')
    settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(name) or ConfigParser.load_config_files(_files(name))
    return list(settings["configs"])


def _files(given: str) -> list[str]:
    """``--config_file``'s value: a path, several with commas, or a list as Python writes one."""
    try:
        return list(ast.literal_eval(given))
    except (ValueError, SyntaxError):
        return [given] if Path(given).is_file() else given.split(",")


def check(*, numbers: Mapping[str, object], switches: Mapping[str, object]) -> None:
    """``check_numbers`` and ``check_switches``."""
    check_numbers(**numbers)
    check_switches(**switches)


def check_switches(**given: object) -> None:
    """Raises ``InputError`` where a switch is neither True nor False: the shell's ``false`` is a text, and true."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(f"--{name} {value}: give True or False")


def check_numbers(**given: object) -> None:
    """Each must be a whole number of at least 1, but ``learning_rate``, which is any above 0.

    Raises:
        InputError: naming the option; also where validation would never happen.
    """
    for name, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        real = name == "learning_rate" and isinstance(value, (int, float)) and 0 < value < math.inf
        if not (whole or real):
            wanted = (
                "a number above 0, written like 0.001," if name == "learning_rate" else "a whole number of at least 1"
            )
            raise InputError(f"--{name} {value}: give {wanted}")
    if given.get("val_interval", 1) > given.get("max_epochs", 1):  # type: ignore[operator]
        raise InputError("--val_interval is more than --max_epochs: no model would be chosen; give fewer")

"""What is given on a bundle's command line: MONAI takes a misspelt option for a new id and says nothing."""

from __future__ import annotations

import ast
import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regpipe.utils.errors import InputError, one_line_errors

MONAI = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")


def begin_command() -> None:
    """Where this process is ``python -m monai.bundle run``: errors end it in a line, misspelt options are refused.

    In any other program nothing: what it does with errors is its own.

    Raises:
        InputError: as ``refuse_unknown``.
    """
    command = [sys.argv[0], *sys.argv[1:2]]
    if Path(command[0]).parts[-3:] == ("monai", "bundle", "__main__.py") and command[1:] == ["run"]:
        one_line_errors()
        refuse_unknown(sys.argv[2:])


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


def refuse_unknown_ids(names: Iterable[str], files: Sequence[str], *, also: Iterable[str] = ()) -> None:
    """Check names of settings, ``id`` or ``id#part``, against the ids at the top of configuration files.

    Raises:
        InputError: a name that no file knows; the nearest one is named.
    """
    from monai.bundle import ConfigParser  # MONAI takes seconds to import

    tops = {_top(key) for key in (*also, *ConfigParser.load_config_files(list(files)))}
    for name in names:
        if _top(name) not in tops:
            near = difflib.get_close_matches(_top(name), sorted(tops), 1)
            meant = f"; did you mean --{near[0]}?" if near else ";"
            raise InputError(f"--{name}: no such option{meant} known are the ids of {', '.join(files)}")


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


def _top(name: str) -> str:
    return re.split("::|#", name.lstrip("+"))[0]


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

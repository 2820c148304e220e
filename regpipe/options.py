"""What is given on a bundle's command line: MONAI takes a misspelt option for a new id and says nothing."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence

from monai.bundle import ConfigParser

from regpipe.errors import InputError

MONAI = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")


def refuse_unknown(argv: Sequence[str] | None = None) -> None:
    """Check the options of ``python -m monai.bundle run`` against the ids of its configuration files.

    Does nothing in any other program.

    Raises:
        InputError: an option that no file knows; the nearest one is named.
    """
    argv = sys.argv if argv is None else argv
    if "bundle" not in argv[0] or "--config_file" not in argv:
        return
    files = re.findall(r"[^\[\]'\",]+", argv[argv.index("--config_file") + 1])
    known = {*MONAI, *ConfigParser.load_config_files([file.strip() for file in files if file.strip()])}
    tops = {re.split("::|#", key)[0] for key in known}
    for option in (arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")):
        name = re.split("::|#", option)[0].replace("-", "_")
        if name not in tops:
            near = difflib.get_close_matches(name, sorted(tops), 1)
            raise InputError(f"--{option}: no such option" + (f"; did you mean --{near[0]}?" if near else ""))


def check_numbers(**given: object) -> None:
    """Each must be a whole number of at least 1, but ``learning_rate``, which is any above 0.

    Raises:
        InputError: naming the option; also where validation would never happen.
    """
    for name, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        real = name == "learning_rate" and isinstance(value, (int, float)) and value > 0
        if not (whole or real):
            wanted = "a number above 0" if name == "learning_rate" else "a whole number of at least 1"
            raise InputError(f"--{name} {value}: give {wanted}")
    if given.get("val_interval", 1) > given.get("max_epochs", 1):  # type: ignore[operator]
        raise InputError("--val_interval is more than --max_epochs: no model would be chosen; give fewer")

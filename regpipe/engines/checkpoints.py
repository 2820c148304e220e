"""The saved states of a training, ``checkpoint_<epoch>.pt``: written whole, checked by their checksums, two kept.

``RandomState`` is their part that holds the random generators.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regpipe.utils.errors import InputError
from regpipe.utils.files import damage, save_tensors

KEPT = 2
ANEW = "give another --ckpt_dir, or --resume False to begin anew"


def saved_states(folder: str | Path) -> list[Path]:
    """The full checkpoints in a folder, oldest first."""
    found = Path(folder).glob("checkpoint_*.pt")
    return sorted(found, key=lambda path: int(path.stem.rpartition("_")[2]))


def save(folder: str | Path, epoch: int, state: Mapping[str, Any]) -> None:
    """Write the state of an epoch, and only then delete older ones."""
    path = Path(folder) / f"checkpoint_{epoch}.pt"
    save_tensors(path, dict(state))
    prune(path)


def prune(sound: Path) -> None:
    """Keep the newest ``KEPT`` of the sound state ``sound`` and all before it."""
    states = saved_states(sound.parent)
    for old in states[: max(states.index(sound) + 1 - KEPT, 0)]:
        old.unlink(missing_ok=True)


def newest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest saved state that is sound, with its file; None where nothing was ever saved.

    Raises:
        InputError: something was saved, and nothing of it is sound.
    """
    problems = []
    for path in reversed(saved_states(folder)):
        why = damage(path)
        if why is None:
            try:
                return path, torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a file of something else fails in many ways
                why = str(error).partition("\n")[0] or type(error).__name__
        problems.append(f"{path}: damaged ({why})")
    if problems:
        raise InputError(f"{'; '.join(problems)}: there is no state to resume from; {ANEW}")
    return None


def training_seconds(folder: str | Path) -> float:
    """Wall-clock seconds that the run saved in ``folder`` took; NaN where its checkpoints are gone or damaged."""
    try:
        found = newest(folder)
    except InputError:
        return math.nan
    return math.nan if found is None else float(found[1]["progress"]["seconds"])


class RandomState:
    """The states of torch's, CUDA's, numpy's and Python's generators, in types that ``weights_only`` loads."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, position, *gauss = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, *gauss],
            "python": list(random.getstate()[1]),
            "python_gauss": random.getstate()[2],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate((3, tuple(state["python"]), state.get("python_gauss")))

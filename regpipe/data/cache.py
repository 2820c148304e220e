"""Tensors kept in files for other processes and later runs: made once, read from then on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import regpipe
from regpipe.io import images
from regpipe.utils.files import damage, save_tensors

FORMAT = 1  # of what is kept: a change of how it is made needs another

log = logging.getLogger(__name__)


class Store:
    """A folder of results, each found by the files that it was made of; where these change, it is made anew.

    Tensors are read by mapping their file: all processes of a machine share one copy in memory.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def tensors(
        self, files: Sequence[str | None], about: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What ``make`` gives or gave.

        Args:
            files: what it is made of; None for a file that a case does not have.
            about: what else it depends on, in types that JSON knows.
            make: called where nothing is kept, or nothing that can be read.
        """
        key = {"version": [regpipe.__version__, FORMAT], "files": [_stamps(file) for file in files], **about}
        path = self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.pt"
        try:
            why = damage(path)  # torch looks at no checksum
            if why:
                raise ValueError(why)
            return torch.load(path, mmap=True, weights_only=True)
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged file fails in many ways
            log.warning("%s: cannot be read (%s), made again", path, str(error).partition("\n")[0])
        tensors = make()
        try:
            save_tensors(path, tensors)
        except OSError as error:  # a full disk: what is kept is a convenience
            log.warning("%s: cannot be kept (%s)", path, error.strerror)
        return tensors

    def arrays(
        self, files: Sequence[str | None], about: Mapping[str, Any], make: Callable[[], Sequence[Any]]
    ) -> list[np.ndarray]:
        """The same for numbers and arrays of float64."""

        def converted() -> dict[str, Tensor]:
            return {str(i): torch.from_numpy(np.array(value, np.float64)) for i, value in enumerate(make())}

        return [tensor.numpy() for tensor in self.tensors(files, about, converted).values()]


def _stamps(path: str | None) -> list[tuple[str, int, int]] | None:
    """Name, size and time of the files that a path stands for."""
    if path is None:
        return None
    return [(str(file.resolve()), size, time) for file, size, time in images.stamps(path)]

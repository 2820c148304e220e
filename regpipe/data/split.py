"""A data set, and which of its pairs are trained on and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regpipe.data.pairs import Case, list_pairs


@dataclass(frozen=True)
class Split:
    """The choices of ``regpipe.list_pairs``, for both parts of a data set."""

    dataset_dir: str
    holdout: float = 0.2
    pairing: str = "all"
    seed: int = 0
    max_val_pairs: int | None = None  # of all but the training pairs

    def pairs(self, part: str) -> list[Case]:
        """``training``, ``validation`` or ``all``."""
        most = None if part == "training" else self.max_val_pairs
        return list_pairs(self.dataset_dir, split=part, max_pairs=most, **self.chosen())

    def chosen(self) -> dict[str, Any]:
        """What decides on which side a pair is."""
        return {"holdout": self.holdout, "pairing": self.pairing, "seed": self.seed}

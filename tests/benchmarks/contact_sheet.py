"""40 pairs that the shipped networks learn from, on one picture: ``python tests/benchmarks/contact_sheet.py``.

Of each pair: fixed, moving, moving warped by the true displacement, and fixed's labels. Seeded: the same picture again.
"""

from __future__ import annotations

import sys

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from regpipe.fields.algebra import warp
from regpipe.phantoms.synthetic import make_pair

SHAPE, ROWS, COLUMNS, SEED = (96, 96), 10, 4, 0
LABELS = 20  # colours


def colours(label: Tensor) -> Tensor:
    """(1, 1, *S) -> (*S, 3)."""
    return torch.from_numpy(colormaps["tab20"]((label[0, 0] % LABELS).numpy())[..., :3])


def strip(generator: torch.Generator) -> Tensor:
    """One pair's four pictures side by side, with a margin."""
    pair = make_pair(SHAPE, generator=generator)
    warped = warp(pair["moving_image"], pair["displacement"])
    grey = [x[0, 0, ..., None].expand(-1, -1, 3) for x in (pair["fixed_image"], pair["moving_image"], warped)]
    row = torch.cat([*grey, colours(pair["fixed_label"])], 1)
    return torch.nn.functional.pad(row, (0, 0, 6, 6, 3, 3), value=1.0)


def main(out: str = "docs/synthetic.jpg") -> None:
    """Write the sheet."""
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.cat([strip(generator) for _ in range(COLUMNS)], 1) for _ in range(ROWS)]
    Image.fromarray((255 * torch.cat(rows).clamp(0, 1)).byte().numpy()).save(out, quality=80)


if __name__ == "__main__":
    main(*sys.argv[1:])

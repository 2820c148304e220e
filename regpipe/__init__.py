"""regpipe: learned diffeomorphic registration of medical images.

    files -> pairs -> encoder features -> velocity -> displacement -> warped -> losses / metrics -> report
     disk    dict     pyramid per image   coarse to    both ways      images    named numbers     tables,
                                          fine, SVF                                               pictures

The convention of every field stands at the top of ``regpipe.fields``.
"""

from regpipe.errors import InputError
from regpipe.pairs import list_pairs, working_grid

from regpipe.checks import check_pairs  # isort: skip  (the order is that of the picture)
from regpipe.loading import LoadPair, collate_pairs  # isort: skip
from regpipe.encoders import BACKBONES, Encoder  # isort: skip
from regpipe.network import SymmetricNet, SymNet, load_symnet  # isort: skip
from regpipe.fields import Registration, compose, integrate, register, warp  # isort: skip
from regpipe.losses import RegistrationLoss  # isort: skip
from regpipe.metrics import measure  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "BACKBONES",
    "Encoder",
    "InputError",
    "LoadPair",
    "Registration",
    "RegistrationLoss",
    "SymNet",
    "SymmetricNet",
    "check_pairs",
    "collate_pairs",
    "compose",
    "integrate",
    "list_pairs",
    "load_symnet",
    "measure",
    "register",
    "warp",
    "working_grid",
]

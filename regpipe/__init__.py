"""regpipe: learned diffeomorphic registration of medical images.

    files -> pairs -> [affine] -> encoder features -> velocity -> displacement -> warped -> losses / metrics -> report
     disk    dict      matrix     pyramid per image   coarse to    both ways      images    named numbers     tables,
                                                      fine, SVF                                               pictures
                                                                       '-> transform files (native, LPS mm) -> apply

The convention of every field stands at the top of ``regpipe.fields``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regpipe.checks import check_pairs as check_pairs
    from regpipe.encoders import BACKBONES as BACKBONES
    from regpipe.encoders import Encoder as Encoder
    from regpipe.errors import InputError as InputError
    from regpipe.fields import (
        Registration as Registration,
    )
    from regpipe.fields import (
        compose as compose,
    )
    from regpipe.fields import (
        integrate as integrate,
    )
    from regpipe.fields import (
        register as register,
    )
    from regpipe.fields import (
        warp as warp,
    )
    from regpipe.loading import LoadPair as LoadPair
    from regpipe.loading import collate_pairs as collate_pairs
    from regpipe.losses import RegistrationLoss as RegistrationLoss
    from regpipe.metrics import measure as measure
    from regpipe.network import SymmetricNet as SymmetricNet
    from regpipe.network import SymNet as SymNet
    from regpipe.network import load_symnet as load_symnet
    from regpipe.pairs import list_pairs as list_pairs
    from regpipe.pairs import working_grid as working_grid

__version__ = "0.1.0"

# The public names in the picture's order, and their rooms: each is opened when it is asked for first, because
# torch and MONAI take seconds to load and a command line's --help shall not.
_ROOMS = {
    "InputError": "errors",
    "list_pairs": "pairs",
    "working_grid": "pairs",
    "check_pairs": "checks",
    "LoadPair": "loading",
    "collate_pairs": "loading",
    "BACKBONES": "encoders",
    "Encoder": "encoders",
    "SymmetricNet": "network",
    "SymNet": "network",
    "load_symnet": "network",
    "Registration": "fields",
    "register": "fields",
    "warp": "fields",
    "compose": "fields",
    "integrate": "fields",
    "RegistrationLoss": "losses",
    "measure": "metrics",
}
__all__ = list(_ROOMS)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'regpipe' has no attribute '{name}'")
    return getattr(import_module(f"regpipe.{_ROOMS[name]}"), name)

# What ``regpipe.`` offers, in the order of the data's way.
__version__: str

from .data.augment import MonaiTransforms as MonaiTransforms
from .data.checks import check_pairs as check_pairs
from .data.load import LoadPair as LoadPair
from .data.load import collate_pairs as collate_pairs
from .data.pairs import list_pairs as list_pairs
from .data.pairs import working_grid as working_grid
from .fields.algebra import Registration as Registration
from .fields.algebra import compose as compose
from .fields.algebra import integrate as integrate
from .fields.algebra import register as register
from .fields.algebra import warp as warp
from .inference.register import register_images as register_images
from .losses.loss import RegistrationLoss as RegistrationLoss
from .metrics.measured import measure as measure
from .networks.encoders import BACKBONES as BACKBONES
from .networks.encoders import Encoder as Encoder
from .networks.symmetric import SymmetricNet as SymmetricNet
from .networks.symnet import SymNet as SymNet
from .networks.symnet import load_symnet as load_symnet
from .utils.errors import InputError as InputError

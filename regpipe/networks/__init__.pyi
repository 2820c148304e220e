from .encoders import BACKBONES as BACKBONES
from .encoders import Encoder as Encoder
from .symmetric import SymmetricNet as SymmetricNet
from .symnet import SymNet as SymNet
from .symnet import load_symnet as load_symnet
from .weights import read_state_dict as read_state_dict

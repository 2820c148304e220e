from .displacement import read_displacement as read_displacement
from .displacement import write_displacement as write_displacement
from .read import read_transform as read_transform

from .algebra import Registration as Registration
from .algebra import compose as compose
from .algebra import integrate as integrate
from .algebra import register as register
from .algebra import resize as resize
from .algebra import warp as warp
from .folds import repair as repair

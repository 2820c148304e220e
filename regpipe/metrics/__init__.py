"""How good a registration is: measures of a case, of many, what is usual, and when not to trust it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

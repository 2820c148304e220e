"""Image pairs with known displacements: closed forms for folders on disk; random ones in torch, during training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

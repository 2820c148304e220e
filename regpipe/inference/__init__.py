"""A folder in, a folder out; what a case leaves; without a network; memory and its ladder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

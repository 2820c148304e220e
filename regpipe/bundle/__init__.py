"""The one template of the three bundles, its writer, and whose configuration runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""The algebra of displacements and velocities, by the one convention in ``algebra``; and folds taken out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

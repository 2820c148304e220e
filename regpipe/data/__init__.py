"""From a folder to tensors: pairs, checks, placement, loading, sampling, augmentation; and manifests."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

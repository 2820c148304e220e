"""What every room needs: errors in a line, the console, files that are whole, limits, processes, memory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

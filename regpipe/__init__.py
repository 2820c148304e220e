"""regpipe: learned diffeomorphic registration of medical images.

    files -> pairs -> [affine] -> encoder features -> velocity -> displacement -> warped -> losses / metrics -> report
     disk    dict      matrix     pyramid per image   coarse to    both ways      images    named numbers     tables,
                                                      fine, SVF                                               pictures
                                                                       '-> transform files (native, LPS mm) -> apply

The convention of every field stands at the top of ``fields.algebra``.
"""

import lazy_loader

__version__ = "0.1.0"

# Each name is opened when it is asked for first: torch and MONAI take seconds to load, and --help shall not.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

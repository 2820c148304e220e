from .run import register_with_bundle as register_with_bundle
from .write import write_all as write_all
from .write import write_bundle as write_bundle

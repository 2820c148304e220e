from .folder import FolderRun as FolderRun
from .from_zero import register_from_zero as register_from_zero
from .register import Registered as Registered
from .register import register_images as register_images

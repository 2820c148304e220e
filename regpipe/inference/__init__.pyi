from .folder import FolderRun as FolderRun
from .from_zero import register_from_zero as register_from_zero
